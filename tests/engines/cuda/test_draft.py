import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from exo.worker.protocol.commands import Generate, Grammar, Load, ReasoningLimit
from exo.worker.protocol.events import Deltas, Event
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_cuda.speculation.ngram_drafter import Drafter
from tests.support.program import Program, Result, ask, runner_command
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf, write_scripted
from tests.support.twins import FLOAT32


def followed(tokens: list[int], n_prompt: int = 0) -> Drafter:
    drafter = Drafter(n_prompt)
    drafter.follow(tokens)
    return drafter


# --- guessing ---


def test_what_followed_the_last_tokens_before_is_the_guess() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    assert followed(tokens).draft(tokens, 3) == [4, 5, 6]


def test_of_several_places_the_latest_is_taken() -> None:
    tokens = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 7, 1, 2, 3]
    assert followed(tokens).draft(tokens, 1) == [5]


def test_text_that_repeats_itself_is_guessed_to_go_on_so() -> None:
    tokens = [7, 8, 7, 8, 7, 8]
    assert followed(tokens).draft(tokens, 5) == [7, 8, 7, 8, 7]


def test_nothing_is_guessed_of_what_has_not_been_said_before() -> None:
    for tokens in ([], [1], list(range(40)), [1, 2, 9, 1, 2]):
        assert followed(tokens).draft(tokens, 4) == []
        assert not followed(tokens).guesses


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 20), st.data())
def test_how_often_a_drafter_looks_does_not_matter(tokens: list[int], size: int, data: st.DataObject) -> None:
    at_once, in_parts = followed(tokens), Drafter(0)
    for cut in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        in_parts.follow(tokens[:cut])
    in_parts.follow(tokens)
    assert at_once.draft(tokens, size) == in_parts.draft(tokens, size)
    assert at_once.rate.share == in_parts.rate.share
    assert len(at_once.draft(tokens, size)) in (0, size)


def test_guesses_that_are_wrong_lower_the_rate_and_right_ones_raise_it() -> None:
    """Whether a draft was verified or not: what comes tells."""
    tokens = [1, 2, 3, 4] * 30
    drafter = followed(tokens)
    assert drafter.rate.share > 0.95
    for token in range(100, 130):
        tokens += [1, 2, 3, token]
        drafter.follow(tokens)
    assert drafter.rate.share < 0.8
    tokens += [1, 2, 3, 4] * 30
    drafter.follow(tokens)
    assert drafter.rate.share > 0.95


def test_guesses_within_the_prompt_do_not_count() -> None:
    tokens = [1, 2, 3, 4] * 10
    assert followed(tokens, len(tokens)).rate.share == 0.0


# --- with llama.cpp ---


class Counting(Program):
    """Also counts the messages that tokens came in."""

    n_messages = 0

    def _sort(self, event: Event) -> None:
        self.n_messages += isinstance(event, Deltas)
        super()._sort(event)


WORDS = re.findall(" [a-z]+", " the old man and his dog went over a hill to see what was there")
SAID = [*range(256, 256 + len(WORDS)), ord("\n")]
"""What the model that repeats its prompt says, and what brings it to say so."""


@dataclass(slots=True)
class Pair:
    """Two runners of one tiny float32 model, the second with drafts."""

    runners: list[Counting]
    repeats: bool
    """Whether the model repeats its prompt."""

    def both(self, request: Generate) -> Result:
        """The result, which is the same with and without drafts; with them it takes fewer steps, if there are any."""
        results: list[Result] = []
        messages: list[int] = []
        for runner in self.runners:
            before = runner.n_messages
            results += runner.generate(request)
            messages.append(runner.n_messages - before)
            del runner.results[request.id]
        without, drafting = results
        assert drafting.tokens == without.tokens
        assert drafting.text == without.text
        assert drafting.pieces == without.pieces
        assert drafting.logprobs == [] or len(drafting.logprobs) == len(without.tokens)
        assert drafting.finished.reason == without.finished.reason
        assert drafting.finished.usage.completion_tokens == without.finished.usage.completion_tokens
        assert messages[0] == len(without.tokens)
        if self.repeats and request.sampling.temperature < 0.5 and len(without.tokens) > 5:
            assert messages[1] < messages[0]
        return drafting


@pytest.fixture(scope="module", params=["repeating", "llama", "gemma3", "repeating on devices"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    kind, _, on_devices = request.param.partition(" ")
    if kind == "repeating":
        write_scripted(path, WORDS)
    else:
        write_gguf(path, Shape(architecture=kind))
    table = dict(FLOAT32)
    backend = "LlamaCppCuda" if on_devices else "LlamaCppCpu"
    command = llama_command(backend)
    with Counting(command) as without, Counting(command) as drafting:
        for program, speculate in ((without, "off"), (drafting, 6)):
            options: dict[str, JsonValue] = {**table, "path": str(path), "n_ctx": 512, "speculate": speculate}
            program.load(Load(model_id="test/tiny", backend=backend, table=options))
        yield Pair([without, drafting], kind == "repeating")


def test_greedy_output_does_not_change(pair: Pair) -> None:
    pair.both(ask("greedy", SAID, max_tokens=200))


def test_seeded_output_does_not_change(pair: Pair) -> None:
    for seed in range(4):
        pair.both(ask("sharp", SAID, temperature=0.1, seed=seed, max_tokens=60))
        pair.both(ask("flat", SAID, temperature=1.0, seed=seed, max_tokens=60))


def test_penalties_count_the_tokens_of_a_draft_one_by_one(pair: Pair) -> None:
    request = ask("penalties", SAID, max_tokens=60, frequency_penalty=1.5, presence_penalty=0.2)
    pair.both(request.model_copy(update={"logprobs": 3}))
    pair.both(ask("repetition", SAID, max_tokens=60, repetition_penalty=1.2))


def test_a_grammar_is_followed_through_a_draft(pair: Pair) -> None:
    for source in ("( the| old| man| and){2,40}", "[a-d ]{40}", "".join(WORDS)):
        grammar = Grammar(syntax="regex", source=source)
        for temperature in (0.0, 0.6):
            request = ask("grammar", SAID, max_tokens=80, temperature=temperature, seed=1)
            pair.both(request.model_copy(update={"grammar": grammar}))


def test_reasoning_is_closed_within_a_draft(pair: Pair) -> None:
    for most in (3, 9, 14):
        limit = ReasoningLimit(max_tokens=most, begin="<think>", end="</think>", closing="</think>\n", inside=True)
        for temperature in (0.0, 0.6):
            request = ask("limit", SAID, max_tokens=60, temperature=temperature, seed=1, ignore_eos=True)
            bounded = pair.both(request.model_copy(update={"reasoning": limit}))
            assert bounded.text.count("</think>\n") == 1


def test_an_end_within_a_draft_ends_there(pair: Pair) -> None:
    """A limit, a stop string, an end-of-generation token."""
    whole = pair.both(ask("whole", SAID, max_tokens=16))
    for length in range(1, 16):
        assert pair.both(ask("length", SAID, max_tokens=length)).tokens == whole.tokens[:length]
        stop = "".join(whole.pieces[length - 1 : length + 1])
        stopped = pair.both(ask("stop", SAID, max_tokens=16, stop=[stop]))
        assert (stopped.finished.reason, stopped.finished.stop) == ("stop", stop)
    ended = pair.both(ask("end", SAID, ignore_eos=False, max_tokens=100))
    assert ended.finished.reason == "stop" or not pair.repeats


def test_what_a_draft_left_in_the_cache_is_of_use(pair: Pair) -> None:
    """The next turn of a conversation finds all of the last one."""
    turn = pair.both(ask("first", SAID, max_tokens=14))
    again = pair.both(ask("second", [*SAID, *turn.tokens, *SAID], max_tokens=14))
    assert again.finished.usage.cached_tokens >= len(SAID) + 13
    assert again.tokens == turn.tokens or not pair.repeats


def test_a_context_is_filled_to_the_last_token(pair: Pair) -> None:
    for length in range(494, 504):
        prompt = [*SAID * 30][:length] + SAID[-1:]
        result = pair.both(ask("full", prompt, max_tokens=None))
        assert len(result.tokens) == 512 - len(prompt)


def test_a_size_that_is_none_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    with Program(runner_command(RUNNERS["cuda"].module)) as program:
        table: dict[str, JsonValue] = {"path": str(tmp_path / "tiny.gguf"), "speculate": 17}
        program.send(Load(model_id="test/tiny", backend="LlamaCppCpu", table=table))
        assert program.drain() != 0
        assert program.failure is not None
        assert "speculate" in program.failure.message
