"""A model's own head for multi-token prediction, with llama.cpp: same tokens, fewer steps; float32 weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Generate, Grammar, Load
from exo.worker.runner_cuda.loading.estimate import estimate
from tests.engines.cuda.test_cache_sizes import COMMON, EXPERTS, LINEAR, Keys
from tests.engines.cuda.test_draft import Counting
from tests.support.any_gguf import write_any
from tests.support.engine_memory import context_memory
from tests.support.program import Result, ask
from tests.support.rpc_devices import llama_command
from tests.support.tiny.heads import CYCLE, Head, write_with_head

PROMPTS = ("once upon a time", "the old man and his dog", "numbers: one two three")
CPU = "LlamaCppCpu"


def load(path: Path, table: Mapping[str, JsonValue], backend: str = CPU) -> Load:
    own: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "threads": 1}
    options: dict[str, JsonValue] = {**own, "path": str(path), "n_ctx": 512, "slots": 3, "n_ubatch": 64, **table}
    return Load(model_id="test/tiny", backend=backend, table=options)


@dataclass(slots=True)
class Pair:
    """The same model without and with its head."""

    off: Counting
    on: Counting
    head: Head

    def both(self, *requests: Generate) -> tuple[list[Result], int, int]:
        """The results, which are the same in both, and the messages that tokens came in without and with the head."""
        results: list[list[Result]] = []
        messages: list[int] = []
        for program in (self.off, self.on):
            before = program.n_messages
            results.append(program.generate(*requests))
            messages.append(program.n_messages - before)
            for request in requests:
                del program.results[request.id]
        for without, guessing in zip(*results, strict=True):
            assert guessing.tokens == without.tokens
            assert (guessing.text, guessing.pieces) == (without.text, without.pieces)
            assert guessing.finished.reason == without.finished.reason
            assert guessing.finished.usage.completion_tokens == without.finished.usage.completion_tokens
        return results[0], messages[0], messages[1]

    @property
    def most(self) -> float:
        """The share of steps that the head leaves at most."""
        return {"state": 0.4, "token": 0.4, "partly": 0.7, "random": 1.0}[self.head]


@pytest.fixture(scope="module", params=["state", "token", "partly", "random", "token on devices", "token in a pool"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, _, where = request.param.partition(" ")
    head: Head = next(each for each in get_args(Head) if each == name)
    path = tmp_path_factory.mktemp("models") / "model.gguf"
    write_with_head(path, head)
    backend = "LlamaCppCuda" if where == "on devices" else CPU
    table: dict[str, JsonValue] = {"kv": "pool"} if where == "in a pool" else {}
    with Counting(llama_command(backend)) as off, Counting(llama_command(backend)) as on:
        off.load(load(path, table, backend))
        on.load(load(path, {"speculate": 4, **table}, backend))
        yield Pair(off, on, head)


def test_output_does_not_change_and_takes_fewer_steps(pair: Pair) -> None:
    for prompt in PROMPTS:
        for temperature in (0.0, 0.4, 1.0):
            request = ask("x", prompt, temperature=temperature, seed=3, max_tokens=80)
            _, without, guessing = pair.both(request)
            assert without == 80
            assert guessing <= pair.most * without


def test_the_head_guesses_for_all_slots_at_once(pair: Pair) -> None:
    requests = [ask(prompt, prompt, seed=1, temperature=0.4, max_tokens=60) for prompt in PROMPTS]
    together, without, guessing = pair.both(*requests)
    for request, result in zip(requests, together, strict=True):
        (alone,), _, _ = pair.both(request)
        assert result.tokens == alone.tokens
    if pair.most < 0.5:
        assert guessing < 0.7 * without


def test_what_a_request_asks_for_beside_tokens_is_the_same(pair: Pair) -> None:
    penalties = ask("p", max_tokens=50, frequency_penalty=1.5, repetition_penalty=1.2, logit_bias={40: -5.0})
    pair.both(penalties.model_copy(update={"logprobs": 3}))
    scored = ask("scored", PROMPTS[1], max_tokens=20).model_copy(update={"prompt_logprobs": 2})
    pair.both(scored)
    grammar = Grammar(syntax="regex", source="[a-d ]{40}")
    pair.both(ask("g", temperature=0.6, seed=1, max_tokens=60).model_copy(update={"grammar": grammar}))


def test_a_conversation_goes_on_in_its_slot_in_another_and_from_its_middle(pair: Pair) -> None:
    """The head has seen all of it, none of the first part, or more than is left."""
    prompt = [(7 * n) % 250 for n in range(200)]
    (turn,), _, _ = pair.both(ask("turn", prompt, max_tokens=40))
    whole = [*prompt, *turn.tokens]
    (again,), without, guessing = pair.both(ask("again", [*whole, 33, 34], max_tokens=40))
    assert again.finished.usage.cached_tokens >= 200
    assert guessing <= pair.most * without
    copies = [ask(f"copy {n}", [*whole, 35 + n], max_tokens=40) for n in range(3)]
    pair.both(*copies)
    _, without, guessing = pair.both(ask("shorter", [*prompt[:120], 1, 2, 3], max_tokens=40))
    assert guessing <= pair.most * without


def test_a_context_is_filled_to_the_last_token(pair: Pair) -> None:
    for length in range(494, 504):
        (full,), _, _ = pair.both(ask("full", [5] * length, max_tokens=None))
        assert len(full.tokens) == 512 - length


def test_a_replay_goes_on_where_it_was(pair: Pair) -> None:
    request = ask("whole", temperature=0.8, seed=9, max_tokens=60)
    (whole,), _, _ = pair.both(request)
    replay = request.model_copy(update={"id": "replay", "delivered": tuple(whole.tokens[:37])})
    (rest,), _, _ = pair.both(replay)
    assert rest.tokens == whole.tokens[37:]


def test_a_cancelled_sequence_leaves_nothing_behind(pair: Pair) -> None:
    (expected,), _, _ = pair.both(ask("expected", PROMPTS[1], max_tokens=40))
    program = pair.on
    program.send(ask("leaving", max_tokens=400), ask("staying", PROMPTS[1], max_tokens=40))
    program.until(lambda: len(program.results.get("leaving", Result()).tokens) > 10)
    program.cancel("leaving")
    program.until(program.ended("leaving", "staying"))
    assert program.results["staying"].tokens == expected.tokens
    assert program.generate(ask("after", PROMPTS[1], max_tokens=40))[0].tokens == expected.tokens


# --- when the head is used ---


def steps(path: Path, **table: JsonValue) -> int:
    """The messages in which a cycle's tokens come."""
    with Counting(llama_command(CPU)) as program:
        program.load(load(path, table))
        program.generate(ask("x", max_tokens=CYCLE - 5))
        return program.n_messages


def test_a_head_is_used_if_the_card_speculates_or_the_output_is_exact(tmp_path: Path) -> None:
    """The tokens of the first cycle are new, so they cannot be guessed from earlier text."""
    path = tmp_path / "model.gguf"
    write_with_head(path, "token")
    exact: dict[str, JsonValue] = {"exact": True, "cache_type_k": "bf16", "cache_type_v": "bf16", "flash_attn": "on"}
    assert steps(path) == CYCLE - 5
    assert steps(path, speculate=4) < CYCLE / 2
    assert "head" in parts(path, **exact)
    assert "head" not in parts(path) | parts(path, speculate="off", **exact)


def test_a_file_that_names_a_head_and_lacks_it_loads_without(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_with_head(path, "none")
    assert steps(path, speculate=4) == CYCLE - 5


def parts(path: Path, **table: JsonValue) -> dict[str, int]:
    return dict(estimate(Estimate(load=load(path, table))).choices[0].parts)


def test_the_ledger_counts_a_head(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_with_head(path, "token")
    without, beside = parts(path), parts(path, speculate=4)
    cells = 3 * 512 * 2 * 2 * 16 * 4  # slots, tokens, keys and values, heads, width, bytes
    assert beside.pop("head") > cells
    assert beside["weights"] > without["weights"] + 2 * 3 * 128 * 64 * 4  # the experts of the head's layer
    assert {**beside, "weights": 0} == {**without, "weights": 0}
    extra = context_memory(load(path, {"speculate": 4})).cache - context_memory(load(path, {})).cache
    assert extra == pytest.approx(cells, rel=0.1)


KINDS: dict[str, Keys] = {"qwen35": LINEAR, "qwen35moe": {**LINEAR, **EXPERTS, "expert_shared_feed_forward_length": 64}}


@pytest.mark.parametrize("architecture", KINDS)
def test_the_head_of_each_architecture_computes(tmp_path: Path, architecture: str) -> None:
    """With zeros as weights, every token is the first one, which each head guesses."""
    path = tmp_path / "model.gguf"
    keys: Keys = {**COMMON, "context_length": 512, "block_count": 5, "nextn_predict_layers": 1, **KINDS[architecture]}
    write_any(path, architecture, keys)
    with Counting(llama_command(CPU)) as program:
        program.load(load(path, {"speculate": 2}))
        results = program.generate(*(ask(f"{n}", prompt, max_tokens=40) for n, prompt in enumerate(PROMPTS)))
        assert all(result.tokens == [0] * 40 for result in results)
        assert program.n_messages < 40
