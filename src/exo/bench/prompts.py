"""The prompts and bodies of a stage's requests. The same seed gives the same prompts, which are random words."""

from collections.abc import Iterator
from itertools import cycle
from random import Random

from pydantic import JsonValue
from pydantic_core import to_json

from exo.bench.options import BenchOptions

_REPEATS = 4
_TEXT = """
able air also animal answer apple area arm art away baby back ball bank base bed bell best big bird black blood
blue board boat body book born both bottom box boy branch bread bridge bright broken brother brown building busy
buy cake camera camp car card care case cat chair chance child church city class clean clear clock cloud coat
cold color common corner cost cotton country cover cross crowd cup current dark daughter day dead deep desert
dinner doctor dog door dream dress drink dry dust ear early earth east egg empty end engine evening eye face
fact family farm fast father field fire fish flat floor flower food foot forest free friend front fruit full
game garden gate girl glass gold good grass gray great green ground group hair half hand happy hard hat head
heart heavy help hill history home horse hot hotel hour house ice idea iron island judge key kind king kitchen
knife lady lake land large last late law leaf leather left letter level light line lion list little long lost
loud love low lunch machine main map mark market meal meat metal middle milk mind mirror money moon morning
mother mountain mouth music name narrow nature near neck new night noise north nose note number ocean office oil
old orange order owner page paint paper park part party past peace pencil people picture piece place plane plant
plate point poor post potato power price public queen quick quiet rain red rice rich right ring river road rock
roof room root rose round salt sand school science sea seat second seed sharp sheep ship shirt shoe shop short
silver sister sky sleep slow small smile snow soap soft song sound south space spoon spring square stable stage
star station steam stone store storm story street strong sugar summer sun sweet table tail tall tea teacher team
thick thin ticket time tired tower town track train tree truck uncle valley village voice wall war warm watch
water wave weather week west wheel white wide wild wind window wine winter wise woman wood word work world yard
year yellow young
"""
_WORDS = _TEXT.split()
"""Most tokenizers have one token for each of these, including the space before it."""


class Prompts:
    """Iterates over prompts without end. No two stages have the same prompts."""

    def __init__(self, options: BenchOptions, stage: str) -> None:
        self._options = options
        self._random = Random(f"{options.seed} {stage}")
        shared = options.shared_words if options.workload == "shared-prefix" else 0
        self._prefixes = cycle([self._words(shared) for _ in range(options.sessions)])

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        words = self._options.prompt_words
        match self._options.workload:
            case "random" | "long-prompt":
                return " ".join(self._words(words))
            case "shared-prefix":
                return " ".join([*next(self._prefixes), *self._words(words)])
            case "repeat":
                return "\n".join([" ".join(self._words(max(1, words // _REPEATS)))] * _REPEATS) + "\n"

    def long(self) -> str:
        """The prompt that arrives among running streams."""
        return " ".join(self._words(self._options.long_words))

    def _words(self, count: int) -> list[str]:
        return self._random.choices(_WORDS, k=count)


def body(options: BenchOptions, prompt: str, number: int, max_tokens: int) -> bytes:
    """The body of a streamed request, with the chosen fields only, because not every server accepts all of them.

    Each ``number`` has its own seed, so that no two texts are the same.
    """
    asked: dict[str, JsonValue] = {"model": options.model}
    if options.endpoint == "chat":
        asked["messages"] = [{"role": "user", "content": prompt}]
    else:
        asked["prompt"] = prompt
    asked |= {"max_tokens": max_tokens, "temperature": options.temperature}
    if options.temperature > 0:
        asked["seed"] = options.seed + number
    if options.top_k is not None:
        asked["top_k"] = options.top_k
    if options.top_p is not None:
        asked["top_p"] = options.top_p
    if options.ignore_eos:
        asked["ignore_eos"] = True
    if options.token_ids:
        asked["return_token_ids"] = True
    return to_json({**asked, "stream": True, "stream_options": {"include_usage": True}, **options.extra})
