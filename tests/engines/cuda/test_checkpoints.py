"""Models whose layers forget, through random conversations: windowed caches and checkpoints never change a token."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from tests.support.program import Program, ask, names
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.hybrid import write_hybrid
from tests.support.tiny.tokenizer import END_OF_TURN, Tokenizer
from tests.support.twins import FLOAT32

END = Tokenizer.of_size(320).id_of(END_OF_TURN)
CONVERSATIONS = 28
"""For each case."""
MODELS: dict[str, Callable[[Path], None]] = {
    "window of 8": lambda path: write_gguf(path, Shape(architecture="gemma3", sliding_window=8)),
    "window of 24": lambda path: write_gguf(path, Shape(architecture="gemma3", sliding_window=24, seed=1)),
    "window of 64": lambda path: write_gguf(path, Shape(architecture="gemma3", sliding_window=64, seed=2)),
    "recurrent": write_hybrid,
    "recurrent with a window of 16": lambda path: write_hybrid(path, 16),
}
GUESSING = "window of 8", "window of 24", "recurrent", "recurrent with a window of 16"


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Starts a runner with a model; rounding is as small as llama.cpp allows, and the cells of a window few."""
    with ExitStack() as stack:

        def start(path: Path, backend: str = "LlamaCppCpu", **more: JsonValue) -> Program:
            table = {**FLOAT32, "n_ctx": 2048}
            program = stack.enter_context(Program(llama_command(backend)))
            table |= {"path": str(path), "n_ubatch": 32, "slots": 2}
            program.load(Load(model_id="test/tiny", backend=backend, table={**table, **more}))
            return program

        yield start


def message(dice: random.Random, length: int) -> list[int]:
    return [*(dice.randrange(97, 123) for _ in range(length)), END]


def answer(program: Program, prompt: list[int], seed: int, length: int = 10) -> tuple[list[int], int]:
    """The tokens that follow, and how many of the prompt's were cached."""
    (result,) = program.generate(ask(next(names()), prompt, max_tokens=length, temperature=seed % 2, seed=seed))
    return result.tokens, result.finished.usage.cached_tokens


def killed(program: Program, prompt: list[int], seed: int, other: Program) -> list[int]:
    """The tokens that follow if the runner is killed after the first of them and the other one goes on."""
    request = ask(next(names()), prompt, max_tokens=10, temperature=seed % 2, seed=seed)
    program.send(request)
    program.until(lambda: request.id in program.results and len(program.results[request.id].tokens) > 0)
    program.process.kill()
    delivered = program.results[request.id].tokens
    (result,) = other.generate(request.model_copy(update={"delivered": tuple(delivered)}))
    return [*delivered, *result.tokens]


class Conversation:
    """The messages of a user and a model, of which a client resends all or some, and changes some."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.messages = [message(self.dice, self.dice.randrange(150, 500))]

    @property
    def prompt(self) -> list[int]:
        return [token for each in self.messages for token in each]

    def replied(self, reply: list[int]) -> None:
        """Goes on in one of the ways in which clients do."""
        dice = self.dice
        match dice.randrange(5):
            case 0:  # the last message again, changed from some place on
                last = self.messages[-1]
                kept = last[: dice.randrange(len(last))]
                self.messages[-1] = kept + message(dice, dice.randrange(1, 120))
            case 1:  # an earlier message, changed
                del self.messages[dice.randrange(len(self.messages)) + 1 :]
                self.messages.append(message(dice, dice.randrange(1, 200)))
            case 2:  # the reply without a part of it
                self.messages += [reply[dice.randrange(len(reply)) :], message(dice, dice.randrange(1, 100))]
            case 3:  # the same prompt
                pass
            case _:
                self.messages += [reply, message(dice, dice.randrange(1, 300))]


@pytest.mark.parametrize(
    ("model", "conversations", "settings"),
    [
        *((model, CONVERSATIONS, {}) for model in MODELS),
        *((model, CONVERSATIONS, {"speculate": 4, "slots": 3}) for model in GUESSING),
        *((model, 3, {"backend": "LlamaCppCuda"}) for model in ("window of 8", "recurrent")),
    ],
    ids=[*MODELS, *(f"{model}, guessing" for model in GUESSING), "window on devices", "recurrent on devices"],
)
def test_random_conversations_have_the_tokens_of_full_caches_and_of_cold_runs(
    model: str, conversations: int, settings: dict[str, Any], tmp_path: Path, start: Callable[..., Program]
) -> None:
    """With side prompts, cancelled requests and kills between, and little RAM for what is in no slot any more."""
    MODELS[model](tmp_path / "tiny.gguf")
    cold = start(tmp_path / "tiny.gguf", swa_full=True, slots=1, prefix_cache_bytes=0)
    full = start(tmp_path / "tiny.gguf", swa_full=True)
    settings = {"swa_full": False, "prefix_cache_bytes": 8 << 20, **settings}
    small = start(tmp_path / "tiny.gguf", **settings)
    computed = {"cold": 0, "full": 0, "small": 0}
    for seed in range(conversations):
        conversation = Conversation(seed)
        for turn in range(3):
            prompt, side = conversation.prompt[:1500], [*conversation.messages[0], 33 + seed, 34 + turn]
            answer(cold, [33], 0, 1)
            expected, cached = answer(cold, prompt, seed)
            assert cached == 0
            if turn == 2:
                cancelled = next(names())
                for program in full, small:
                    program.send(ask(cancelled, [*prompt[: seed * 20], 40, 41], max_tokens=500))
                    program.cancel(cancelled)
            elif turn == 1 and seed % 9 == 2:
                other = start(tmp_path / "tiny.gguf", **settings)
                assert killed(small, prompt, seed, other) == expected
                small = other
            together = next(names())
            if turn % 2:
                for program in full, small:
                    program.send(ask(together, side, max_tokens=5))
            got = {"full": answer(full, prompt, seed), "small": answer(small, prompt, seed)}
            assert {name: tokens for name, (tokens, _) in got.items()} == {"full": expected, "small": expected}
            computed["cold"] += len(prompt)
            for name, (_, cached) in got.items():
                computed[name] += len(prompt) - cached
            if turn % 2:
                for program in full, small:
                    program.until(program.ended(together))
                assert full.results[together].tokens == small.results[together].tokens
            conversation.replied(expected)
    assert computed["small"] < computed["cold"] / 2
    assert computed["small"] < 1.25 * computed["full"]


@pytest.mark.parametrize("model", ["recurrent", "recurrent with a window of 16"])
def test_right_guesses_save_steps_and_wrong_ones_are_rolled_back(
    model: str, tmp_path: Path, start: Callable[..., Program]
) -> None:
    """The texts consist of three letters, so that guesses from earlier text abound."""
    MODELS[model](tmp_path / "tiny.gguf")
    usual, guessing = start(tmp_path / "tiny.gguf"), start(tmp_path / "tiny.gguf", speculate=4)
    bias = {97: 30.0, 98: 30.0, 99: 30.0, END: 29.0}
    accepted = drafted = 0
    for seed in range(12):
        prompt = message(random.Random(seed), 100)
        first = ask(
            f"first {seed}", prompt, seed=seed, temperature=1, max_tokens=300, ignore_eos=False, logit_bias=bias
        )
        (expected,) = usual.generate(first)
        (result,) = guessing.generate(first)
        assert result.tokens == expected.tokens
        accepted += result.finished.usage.accepted_tokens
        drafted += result.finished.usage.drafted_tokens
        # Two that continue the text at once: one of them takes a copy of a state that may have been rolled back.
        together = [
            ask(f"{name} {seed}", [*prompt, *result.tokens, 97 + at], seed=at, max_tokens=20, logit_bias=bias)
            for at, name in enumerate(("second", "third"))
        ]
        continued = guessing.generate(*together)
        assert [each.tokens for each in continued] == [usual.generate(each)[0].tokens for each in together]
    assert 0 < accepted < drafted


@pytest.mark.parametrize("model", ["full", "window of 24", "recurrent"])
def test_an_agent_that_drops_its_reasoning_has_little_more_than_its_new_tokens_computed(
    model: str, tmp_path: Path, start: Callable[..., Program]
) -> None:
    """Ten turns of about 300 new tokens. Each drops the first half of the reply before, as templates drop reasoning."""
    write = MODELS.get(model, lambda path: write_gguf(path, Shape()))
    write(tmp_path / "tiny.gguf")
    program, dice = start(tmp_path / "tiny.gguf", n_ctx=4096), random.Random(0)
    prompt = message(dice, 1000)
    reply, _ = answer(program, prompt, 0, 200)
    computed = new = 0
    for turn in range(1, 10):
        added = [*reply[100:], END, *message(dice, 200)]
        prompt = prompt + added
        reply, cached = answer(program, prompt, turn, 200)
        computed, new = computed + len(prompt) - cached, new + len(added)
    assert new <= computed <= 1.1 * new


@pytest.mark.parametrize("model", ["window of 8", "window of 24", "window of 64"])
def test_cells_are_used_again_down_to_the_first_that_the_next_token_sees(
    model: str, tmp_path: Path, start: Callable[..., Program]
) -> None:
    """Without checkpoints, a prompt is cut at each place around the one where the window loses its first cell."""
    MODELS[model](tmp_path / "tiny.gguf")
    program = start(tmp_path / "tiny.gguf", slots=1, prefix_cache_bytes=0)
    cold = start(tmp_path / "tiny.gguf", slots=1, prefix_cache_bytes=0, swa_full=True)
    dice = random.Random(0)
    prompt = message(dice, 400)

    def score(program: Program, prompt: list[int]) -> tuple[float, int]:
        """The log-probability of the next token, and how many of the prompt's were cached."""
        request = ask(next(names()), prompt, max_tokens=1).model_copy(update={"logprobs": 0})
        (result,) = program.generate(request)
        logprob = result.logprobs[0].chosen.logprob
        assert logprob is not None
        return logprob, result.finished.usage.cached_tokens

    def cut(length: int) -> int:
        """Returns how many tokens of a prompt that leaves the first one there are not computed."""
        for each in cold, program:
            answer(each, [33], 0, 1)
        answer(program, prompt, 0, 1)
        other = [*prompt[:length], 65]
        logprob, cached = score(program, other)
        assert logprob == pytest.approx(score(cold, other)[0], abs=1e-5)
        return cached

    least = next(length for length in range(128, 400, 8) if cut(length) == length)
    cached = [cut(length) for length in range(least - 8, least)]
    lost = cached.count(0)
    assert lost > 0
    assert cached == [0] * lost + [*range(least - 8 + lost, least)]
