"""Has each engine score given texts, by its program with ``--score``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import anyio
from pydantic import TypeAdapter, ValidationError

from exo.compare.comparison import CompareError, TokenisationDifference
from exo.compare.engine import ComparedEngine
from exo.worker.protocol.commands import Text
from exo.worker.protocol.events import Capabilities, Failed
from exo.worker.protocol.score import Score, Scored
from exo.worker.protocol.wire import encode

Tokens = tuple[int, ...]
_ANSWER: TypeAdapter[Scored | Failed] = TypeAdapter(Scored | Failed)


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scored texts. ``files`` hold the log-probabilities of ``tokens`` in the form that ``Score`` defines."""

    engine: str
    tokens: tuple[Tokens, ...]
    files: tuple[Path, ...]
    capabilities: Capabilities
    settings: Mapping[str, str]


async def score(engine: ComparedEngine, prompts: Sequence[str | Tokens], directory: Path) -> Scoring:
    """Scores ``prompts``, which are texts or token ids. Raises CompareError.

    The files in ``directory``, which must exist, take 4 bytes per token and vocabulary entry.
    """
    parts = tuple((Text(text=each),) if isinstance(each, str) else each for each in prompts)
    request = Score(load=engine.load, prompts=parts, directory=str(directory))
    try:
        done = await anyio.run_process([*engine.command, "--score"], input=encode(request), check=False)
    except OSError as error:
        raise CompareError(f"engine {engine.name}: {engine.command[0]} could not be started: {error}") from error
    try:
        answer = _ANSWER.validate_json(done.stdout)
    except ValidationError:
        said = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-5:])
        raise CompareError(
            f"engine {engine.name}: scoring ended with status {done.returncode} and no answer: {said}"
        ) from None
    if isinstance(answer, Failed):
        raise CompareError(f"engine {engine.name}: {answer.message}")
    files = tuple(directory / f"{index}.npy" for index in range(len(prompts)))
    return Scoring(engine.name, answer.tokens, files, answer.capabilities, answer.settings)


async def score_same(
    engine: ComparedEngine, texts: Sequence[str], reference: Scoring, directory: Path
) -> tuple[Scoring, tuple[TokenisationDifference, ...]]:
    """Scores the tokens of ``reference``, and finds where ``engine`` would split ``texts`` into other tokens.

    The engine scores the texts first, which suffices if both tokenizers agree. Raises CompareError.
    """
    own = await score(engine, texts, directory)
    differing = [index for index, tokens in enumerate(own.tokens) if tokens != reference.tokens[index]]
    if not differing:
        return own, ()
    again = await score(engine, [reference.tokens[index] for index in differing], Path(mkdtemp(dir=directory)))
    files = dict(enumerate(own.files)) | dict(zip(differing, again.files, strict=True))
    findings = [_tokenised_differently(index, reference.tokens[index], own.tokens[index]) for index in differing]
    return replace(own, tokens=reference.tokens, files=tuple(files.values())), tuple(findings)


def _tokenised_differently(prompt: int, reference: Tokens, other: Tokens) -> TokenisationDifference:
    pairs = zip(reference, other, strict=False)
    common = next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(reference), len(other)))
    return TokenisationDifference(
        prompt=prompt, position=common, reference_tokens=reference[common:], other_tokens=other[common:]
    )
