"""The front end of all runners, driven with a small engine that computes nothing."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

import pytest

from exo.worker.protocol.commands import (
    Cancel,
    Command,
    Cores,
    Embed,
    Estimate,
    Generate,
    Grammar,
    Load,
    Prompt,
    Rank,
    SamplingParams,
    Shutdown,
    Text,
    Tokenize,
)
from exo.worker.protocol.events import (
    Capabilities,
    Embedded,
    Estimated,
    Event,
    Failed,
    Finished,
    LoadOption,
    Status,
    Tokenized,
    Usage,
)
from exo.worker.protocol.wire import decode_event
from exo.worker.runner_common.commands import Commands, TextJob
from exo.worker.runner_common.front_end import FrontEnd, LoadedEngine, Prepared
from exo.worker.runner_common.output_processor import Emitter, Item, StepDone
from exo.worker.runner_common.sequence import Sampled

SECONDS = 30
N_CTX = 16
PROMPT = (Text(text="abc"),)
Terminal = Finished | Failed | Embedded | Tokenized


class Events(io.BytesIO):
    """The protocol stream; the events that the emitter writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: SimpleQueue[Event] = SimpleQueue()
        self.all: list[Event] = []

    def write(self, lines: object, /) -> int:
        assert isinstance(lines, bytes)
        for line in lines.splitlines():
            self._queue.put(decode_event(line))
        return len(lines)

    def until(self, is_last: Callable[[Event], bool]) -> Event:
        """Reads events up to the first for which ``is_last`` holds."""
        while True:
            event = self._queue.get(timeout=SECONDS)
            self.all.append(event)
            if is_last(event):
                return event

    def terminals(self, request: str) -> list[Terminal]:
        """The terminal events of a request among all events read."""
        return [e for e in self.all if isinstance(e, Terminal) and e.id == request]


class ByteTokenizer:
    """Each byte is a token."""

    n_vocab = 257
    eog_tokens = (256,)

    def encode(self, prompt: Prompt, *, add_bos: bool = True) -> list[int]:
        texts = [part.text.encode() for part in prompt if isinstance(part, Text)]
        return [*b"".join(texts), *(part for part in prompt if isinstance(part, int))]

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def piece_of(self, token: int) -> bytes:
        return self.bytes_of(token)

    def is_eog(self, token: int) -> bool:
        return token == 256

    def is_control(self, token: int) -> bool:
        return token == 256


@dataclass(frozen=True)
class Asked:
    """A sequence of the engine below."""

    request: Generate
    n_limit: int


class IdleEngine:
    """Keeps sequences and texts until they are cancelled. ``on_add`` makes the results of a new sequence."""

    def __init__(self, emitter: Emitter, on_add: Callable[[str], list[Item]]) -> None:
        self._emitter = emitter
        self._on_add = on_add
        self.sequences: dict[str, Asked] = {}
        self.texts: dict[str, TextJob] = {}
        self.cores: list[int] = []
        self.removed: list[str] = []
        self.commands: Commands[Asked] = Commands(
            emitter, add=self._add, add_text=self._add_text, remove=self._remove, use_cores=self.cores.append
        )

    def run(self) -> None:
        while self.commands.handle(wait=True):
            pass

    def prepare(self, request: Generate) -> Prepared[Asked]:
        return Prepared(ByteTokenizer().encode(request.prompt), lambda n_limit, _: Asked(request, n_limit))

    def _add(self, sequence: Asked) -> None:
        self.sequences[sequence.request.id] = sequence
        for item in self._on_add(sequence.request.id):
            self._emitter.put(item)

    def _add_text(self, job: TextJob) -> None:
        self.texts[job.id] = job
        usage = Usage(prompt_tokens=len(job.tokens), completion_tokens=0)
        self._emitter.put(Embedded(id=job.id, vector=(1.0,), usage=usage))

    def _remove(self, request: str) -> bool:
        self.removed.append(request)
        return self.sequences.pop(request, None) is not None or self.texts.pop(request, None) is not None


class Driven:
    """A front end with this engine. ``serve`` gives it commands and returns after its last event."""

    def __init__(
        self,
        on_add: Callable[[str], list[Item]] = lambda _: [],
        *,
        no_generation: str = "",
        grammar: bool = True,
        embeddings: bool = True,
    ) -> None:
        self.events = Events()
        self._emitter = Emitter(self.events)
        self.engine = IdleEngine(self._emitter, on_add)
        self._capabilities = Capabilities(
            engine="none", engine_version="0", backend="None", context_length=N_CTX, slots=1, vocabulary=257,
            grammar=grammar, embeddings=embeddings,
        )  # fmt: skip
        self._no_generation = no_generation

    def serve(self, commands: Callable[[], Iterator[Command | Failed]]) -> None:
        self._emitter.start()
        FrontEnd(self._emitter, self._load, self._estimate, lambda _: None).serve(commands())
        self.events.until(lambda event: isinstance(event, Status) and event.state == "Shutdown")

    def load(self) -> Load:
        return Load(model_id="any", backend="None")

    def until_ready(self) -> None:
        self.events.until(lambda event: isinstance(event, Status) and event.capabilities is not None)

    def until_ended(self, request: str) -> None:
        self.events.until(lambda event: isinstance(event, Terminal) and event.id == request)

    def until_accepted(self, request: str) -> None:
        self.events.until(lambda event: event.type == "prefill_progress" and event.id == request)

    def _load(self, _: Load) -> LoadedEngine[Asked]:
        return LoadedEngine(
            tokenizer=ByteTokenizer(),
            capabilities=self._capabilities,
            no_generation=self._no_generation,
            longest_text=N_CTX,
            closing=(),
            text_tokens=lambda request: [] if isinstance(request, Rank) else ByteTokenizer().encode(request.prompt),
            prepare=self.engine.prepare,
            commands=self.engine.commands,
            run=self.engine.run,
            counts=lambda: (0, 0, 0),
        )

    def _estimate(self, _: Estimate) -> Estimated:
        return Estimated(choices=(LoadOption(host=7),))


def generate(name: str, *, stop: tuple[str, ...] = (), grammar: Grammar | None = None) -> Generate:
    return Generate(id=name, prompt=PROMPT, sampling=SamplingParams(seed=0), stop=stop, grammar=grammar)


def served(driven: Driven, *requests: Command | Failed) -> Driven:
    """Serves requests that each end by themselves."""

    def commands() -> Iterator[Command | Failed]:
        yield driven.load()
        driven.until_ready()
        for request in requests:
            yield request
            driven.until_ended(getattr(request, "id", ""))
        yield Shutdown()

    driven.serve(commands)
    return driven


def sampled(request: str, text: str) -> StepDone:
    return StepDone([], [], [Sampled(request, byte, None) for byte in text.encode()])


def failed(request: str) -> Failed:
    return Failed(id=request, code="engine_error", message="the engine has failed")


def test_an_engine_that_fails_after_a_stop_string_ends_the_request_only_once() -> None:
    driven = served(Driven(lambda name: [sampled(name, "xyz"), failed(name)]), generate("a", stop=("y",)))
    (finished,) = driven.events.terminals("a")
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.stop) == ("stop", "y")
    assert driven.engine.removed == ["a"]


def test_an_engine_that_fails_a_request_ends_it_once() -> None:
    driven = served(Driven(lambda name: [sampled(name, "x"), failed(name), failed(name)]), generate("a"))
    assert driven.events.terminals("a") == [failed("a")]


def test_a_request_is_cancelled_once_however_often_that_is_asked_for() -> None:
    driven = Driven()

    def commands() -> Iterator[Command | Failed]:
        yield driven.load()
        driven.until_ready()
        yield Cancel(id="unknown")
        yield generate("a")
        yield Cancel(id="a")
        yield Cancel(id="a")
        driven.until_ended("a")
        yield Cancel(id="a")
        yield Shutdown()

    driven.serve(commands)
    (finished,) = driven.events.terminals("a")
    assert isinstance(finished, Finished)
    assert finished.reason == "cancelled"
    assert not driven.engine.sequences
    assert not driven.events.terminals("unknown")


def test_requests_in_flight_fail_at_a_shutdown() -> None:
    driven = Driven()

    def commands() -> Iterator[Command | Failed]:
        yield driven.load()
        driven.until_ready()
        yield generate("a")
        yield generate("b")
        yield Shutdown()

    driven.serve(commands)
    for request in ("a", "b"):
        (ended,) = driven.events.terminals(request)
        assert isinstance(ended, Failed)
        assert ended.code == "shutdown"


def test_a_faulty_line_that_names_a_running_request_ends_it_once_and_frees_its_slot() -> None:
    driven = Driven()

    def commands() -> Iterator[Command | Failed]:
        yield driven.load()
        driven.until_ready()
        yield generate("a")
        driven.until_accepted("a")
        yield failed("a")
        driven.until_ended("a")
        yield Shutdown()

    driven.serve(commands)
    assert driven.events.terminals("a") == [failed("a")]
    assert not driven.engine.sequences


def test_a_request_that_comes_before_the_model_is_refused() -> None:
    driven = Driven()

    def commands() -> Iterator[Command | Failed]:
        yield generate("a")
        driven.until_ended("a")
        yield driven.load()
        driven.until_ready()
        yield driven.load()
        driven.events.until(lambda event: isinstance(event, Failed) and event.id is None)
        yield Shutdown()

    driven.serve(commands)
    (refused,) = driven.events.terminals("a")
    assert isinstance(refused, Failed)
    assert refused.message == "the model is not loaded yet"


@pytest.mark.parametrize(
    ("request_made", "driven", "param"),
    [
        (generate("a"), Driven(no_generation="it only ranks"), "model"),
        (generate("a", grammar=Grammar(syntax="regex", source="x")), Driven(grammar=False), "grammar"),
        (generate("a", stop=("",)), Driven(), "stop"),
        (Embed(id="a", prompt=PROMPT), Driven(embeddings=False), "model"),
        (Rank(id="a", query="b", document="c"), Driven(), "model"),
        (Tokenize(id="a", prompt=(999,)), Driven(), "prompt"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(request_made: Command, driven: Driven, param: str) -> None:
    (refused,) = served(driven, request_made).events.terminals("a")
    assert isinstance(refused, Failed)
    assert (refused.code, refused.param) == ("invalid_request", param)
    assert refused.message.startswith(f"{param}: ")
    assert not driven.engine.sequences


def test_texts_and_tokens_are_answered() -> None:
    texts = Embed(id="a", prompt=(Text(text="x" * 20),), truncate=True), Tokenize(id="b", prompt=PROMPT)
    driven = served(Driven(), *texts)
    (embedded,), (tokenized,) = driven.events.terminals("a"), driven.events.terminals("b")
    assert isinstance(embedded, Embedded)
    assert embedded.usage.prompt_tokens == N_CTX
    assert isinstance(tokenized, Tokenized)
    assert tokenized.tokens == (97, 98, 99)


def test_a_request_that_another_runner_has_all_but_finished_is_finished_without_the_engine() -> None:
    resumed = generate("a", stop=("y",)).model_copy(update={"delivered": tuple(b"xy")})
    driven = served(Driven(), resumed)
    (finished,) = driven.events.terminals("a")
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.completion_tokens) == ("stop", 2)
    assert not driven.engine.sequences


def test_an_estimate_needs_no_model_and_cores_reach_the_engine() -> None:
    driven = Driven()

    def commands() -> Iterator[Command | Failed]:
        yield Estimate(load=driven.load())
        driven.events.until(lambda event: isinstance(event, Estimated))
        yield driven.load()
        driven.until_ready()
        yield Cores(count=3)
        yield Shutdown()

    driven.serve(commands)
    assert driven.engine.cores == [3]
