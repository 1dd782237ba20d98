"""The contract of ``exo.worker.protocol.messages``, run against every runner. A runner joins by one line in CASES."""

import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pydantic import JsonValue

from exo.worker.protocol.messages import (
    LINE_BYTES,
    MAX_PROMPT_LOGPROBS,
    PART_LOGPROBS,
    Cancel,
    Capabilities,
    Cores,
    Generate,
    Grammar,
    Load,
    SamplingParams,
    Score,
    Sibling,
    Text,
    Tokenize,
)
from exo.worker.protocol.runners import RUNNERS
from tests.conftest import needs_vllm
from tests.support import fake_runner
from tests.support.program import Program, Result, ask, names, runner_command
from tests.support.tiny import Shape, write_gguf, write_mlx

Table = dict[str, JsonValue]

LLAMA_BACKEND = os.environ.get("EXO_TEST_LLAMA_BACKEND", "LlamaCppCpu")
"""Of the llama.cpp runner: LlamaCppCuda where there is a card, as ``scripts/gpu_check`` says."""


TWIN = Shape(head_dim=64)
"""Heads of the smallest size that vLLM has attention for."""


def gguf_table(folder: Path) -> Table:
    """A tiny float32 model, and a context that rounds as little as llama.cpp can."""
    path = folder / "tiny.gguf"
    if not path.exists():
        write_gguf(path, TWIN)
    return {"path": str(path), "cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "threads": 1}


def mlx_table(folder: Path) -> Table:
    """The same weights."""
    path = folder / "tiny"
    if not path.exists():
        write_mlx(path, TWIN)
    return {"path": str(path), "dtype": "float32"}


def vllm_table(folder: Path) -> Table:
    """The same folder."""
    return {**mlx_table(folder), "threads": 1}


@dataclass(frozen=True, slots=True)
class Case:
    """How to start a runner and what its card's table says. ``samples`` if it has a model to sample from."""

    command: tuple[str, ...]
    backend: str
    table: Callable[[Path], Table]
    samples: bool = True
    slow: Table = field(default_factory=dict[str, JsonValue])
    """What makes it slow enough for a test to step in between two tokens, where it is not slow by itself."""
    small_chunks: Table = field(default_factory=lambda: {"n_batch": 32, "n_ubatch": 32})
    """What makes it compute a prompt in many steps."""
    free_threads: Table = field(default_factory=dict[str, JsonValue])
    """What leaves the number of its threads open."""
    cache_block: int = 1
    """Tokens that its prefix cache reuses together or not at all."""
    tasks: tuple[str, ...] = ()
    """As the card has them, where the runner must know."""


CASES = {
    "fake": Case(
        fake_runner.COMMAND,
        "LlamaCppCpu",
        lambda _: {},
        samples=False,
        slow={"step_seconds": 0.01},
        small_chunks={"chunk": 32},
    ),
    "cuda": Case(
        tuple(runner_command(RUNNERS["cuda"].module)), LLAMA_BACKEND, gguf_table, free_threads={"threads": None}
    ),
    "mlx": Case(tuple(runner_command(RUNNERS["mlx"].module)), "MlxCpu", mlx_table, small_chunks={"prefill_chunk": 32}),
    "vllm": Case(
        RUNNERS["vllm"].command,
        "Vllm",
        vllm_table,
        small_chunks={"max_num_batched_tokens": 32},
        cache_block=32,
    ),
}
EVERY_RUNNER = [pytest.param(name, marks=needs_vllm) if name == "vllm" else name for name in CASES]
SAMPLING = [each for each, case in zip(EVERY_RUNNER, CASES.values(), strict=True) if case.samples]

name = names()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@dataclass(frozen=True, slots=True)
class Start:
    """Starts runners of one kind and ends them with the test."""

    case: Case
    folder: Path
    running: list[Program]

    def load_command(self, **table: JsonValue) -> Load:
        own = self.case.table(self.folder)
        return Load(model_id="test/tiny", backend=self.case.backend, table={**own, **table}, tasks=self.case.tasks)

    def bare(self) -> Program:
        program = Program(self.case.command).__enter__()
        self.running.append(program)
        return program

    def loaded(self, **table: JsonValue) -> Program:
        program = self.bare()
        program.load(self.load_command(**table))
        return program

    def slow(self, **table: JsonValue) -> Program:
        return self.loaded(**{**self.case.slow, **table})


@pytest.fixture(params=EVERY_RUNNER)
def start(request: pytest.FixtureRequest, folder: Path) -> Iterator[Start]:
    starter = Start(CASES[request.param], folder, [])
    yield starter
    for program in starter.running:
        program.__exit__(None, None, None)


@pytest.fixture(scope="module", params=EVERY_RUNNER)
def program(request: pytest.FixtureRequest, folder: Path) -> Iterator[Program]:
    """One loaded runner for all tests that leave it as they found it."""
    starter = Start(CASES[request.param], folder, [])
    yield starter.loaded(slots=4, n_ctx=512)
    starter.running[0].__exit__(None, None, None)


@pytest.fixture(scope="module", params=SAMPLING)
def sampling_program(request: pytest.FixtureRequest, folder: Path) -> Iterator[Program]:
    starter = Start(CASES[request.param], folder, [])
    yield starter.loaded(slots=16, n_ctx=512)
    starter.running[0].__exit__(None, None, None)


def one(program: Program, request: Generate) -> Result:
    return program.generate(request)[0]


def long_prompt(tokens: int) -> list[int]:
    return [97 + index * index % 23 for index in range(tokens)]


# --- starting ---


def test_states_lead_to_ready_which_says_what_the_runner_can_do(start: Start) -> None:
    program = start.bare()
    capabilities = program.load(start.load_command(slots=3, n_ctx=512))
    assert program.states[0] == "Idle"
    assert program.states[-1] == "Ready"
    assert {"Loading", "Loaded"} <= set(program.states)
    assert program.states.count("Ready") == 1
    assert (capabilities.slots, capabilities.context_length) == (3, 512)
    assert capabilities.vocabulary > 0
    assert capabilities.engine_version


def test_nothing_is_accepted_before_the_model_is_loaded(start: Start) -> None:
    program = start.bare()
    early = next(name)
    assert one(program, ask(early)).failed.code == "invalid_request"
    program.load(start.load_command())
    assert one(program, ask(next(name))).finished.reason == "length"


def test_a_model_that_does_not_load_fails_the_runner(start: Start) -> None:
    program = start.bare()
    program.send(start.load_command(no_such_key=1))
    assert program.drain() != 0
    assert program.failure is not None
    assert "no_such_key" in program.failure.message


def test_a_share_of_the_cores_may_come_at_any_time_and_changes_no_token(start: Start) -> None:
    program = start.slow(n_ctx=512, slots=2, **start.case.free_threads)
    undisturbed = one(program, ask(next(name), max_tokens=40))
    first, exact = next(name), next(name)
    program.send(Cores(count=1), ask(first, max_tokens=40))
    program.until(lambda: first in program.results and len(program.results[first].tokens) > 2)
    program.send(Cores(count=2), ask(exact, max_tokens=40).model_copy(update={"exact": True}), Cores(count=1))
    program.until(program.ended(first, exact))
    assert program.results[first].tokens == program.results[exact].tokens == undisturbed.tokens


# --- one request ---


def test_a_request_is_accepted_answered_and_ended_once(program: Program) -> None:
    result = one(program, ask(next(name), max_tokens=12))
    assert result.prefill[0].processed == 0
    assert result.prefill[-1].processed == result.prefill[-1].total == result.finished.usage.prompt_tokens
    assert len(result.tokens) == result.finished.usage.completion_tokens == 12
    assert result.finished.reason == "length"
    assert result.text
    one(program, ask(next(name)))
    assert result.after_end == []


def test_text_and_token_ids_are_two_ways_to_give_one_prompt(program: Program) -> None:
    letters = "once upon a time"
    from_text = one(program, ask(next(name), letters))
    again = one(program, ask(next(name), letters))
    assert from_text.tokens == again.tokens
    ids = one(program, ask(next(name), long_prompt(9)))
    assert ids.finished.usage.prompt_tokens == 9


def goes_on_from_everywhere(program: Program, request: Generate) -> Result:
    """What a replay relies on: cut after any number of tokens, the rest follows as if nothing had happened."""
    (whole,) = program.generate(request)
    assert len(whole.pieces) == len(whole.tokens)
    cuts = range(len(whole.tokens) + 1)
    continued = [request.model_copy(update={"id": next(name), "delivered": tuple(whole.tokens[:cut])}) for cut in cuts]
    for cut, rest in zip(cuts, program.generate(*continued), strict=True):
        assert whole.tokens[:cut] + rest.tokens == whole.tokens, cut
        assert "".join(whole.pieces[:cut]) + rest.text == whole.text, cut
        assert (rest.finished.reason, rest.finished.stop) == (whole.finished.reason, whole.finished.stop), cut
        usage, undisturbed = rest.finished.usage, whole.finished.usage
        assert usage.prompt_tokens == undisturbed.prompt_tokens, cut
        assert usage.completion_tokens == undisturbed.completion_tokens, cut
        assert usage.cached_tokens <= usage.prompt_tokens, cut
        assert rest.prefill[0].total == usage.prompt_tokens + cut
        assert rest.after_end == []
    return whole


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generation_goes_on_from_the_tokens_delivered(program: Program, temperature: float) -> None:
    goes_on_from_everywhere(program, ask(next(name), long_prompt(7), max_tokens=20, temperature=temperature, seed=5))
    goes_on_from_everywhere(program, ask(next(name), "words", max_tokens=20, temperature=temperature, seed=6))


def test_a_stop_string_across_the_cut_is_found_and_what_was_held_back_is_not_lost(program: Program) -> None:
    free = one(program, ask(next(name), max_tokens=24))
    for start in (0, 7, 13):
        stop = free.text[start : start + 6]
        whole = goes_on_from_everywhere(program, ask(next(name), max_tokens=24, stop=[stop]))
        assert whole.finished.stop == stop
    never = [free.text[-3:] + "never", free.text[5:9] + "\x00"]
    assert goes_on_from_everywhere(program, ask(next(name), max_tokens=24, stop=never)).text == free.text


def test_a_context_that_the_delivered_tokens_fill_ends_by_length(program: Program) -> None:
    whole = goes_on_from_everywhere(program, ask(next(name), long_prompt(504), max_tokens=None))
    assert (whole.finished.reason, len(whole.tokens)) == ("length", 8)


def test_delivered_tokens_that_the_model_does_not_have_are_refused(program: Program) -> None:
    request = ask(next(name)).model_copy(update={"delivered": (97, 10**6)})
    assert one(program, request).failed.param == "delivered"


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(program: Program) -> None:
    free = one(program, ask(next(name), max_tokens=24))
    for start in range(2, 12):
        stop = free.text[start : start + 4]
        stopped = one(program, ask(next(name), max_tokens=24, stop=[stop]))
        assert stopped.text == free.text[: free.text.index(stop)]
        assert (stopped.finished.reason, stopped.finished.stop) == ("stop", stop)
        assert len(stopped.tokens) == stopped.finished.usage.completion_tokens <= 24
        assert free.tokens[: len(stopped.tokens)] == stopped.tokens


@pytest.mark.parametrize(("before", "after"), [("", ""), ("x", ""), ("", "y"), ("x", "y")])
def test_a_stop_string_may_name_control_tokens(program: Program, before: str, after: str) -> None:
    assert program.capabilities is not None
    control = program.capabilities.special_tokens[0]
    grammar = Grammar(syntax="lark", source=f'start: "ax" {control} "yb"')
    stop = (before + control + after, "never" + control, control + "never")
    whole = goes_on_from_everywhere(program, constrained(grammar, stop=stop))
    assert (whole.text, whole.finished.reason, whole.finished.stop) == ("ax".removesuffix(before), "stop", stop[0])
    missed = goes_on_from_everywhere(program, constrained(grammar, stop=stop[1:]))
    assert (missed.text, missed.finished.stop) == ("axyb", None)


def test_text_held_back_for_a_stop_string_that_never_comes_is_not_lost(program: Program) -> None:
    free = one(program, ask(next(name), max_tokens=8))
    held = one(program, ask(next(name), max_tokens=8, stop=[free.text[-2:] + "never", free.text[3:5] + "\x00"]))
    assert held.text == free.text
    assert held.finished.reason == "length"


# --- limits ---


def test_a_prompt_that_leaves_no_room_is_refused_before_it_starts(program: Program) -> None:
    refused = one(program, ask(next(name), long_prompt(512))).failed
    assert (refused.code, refused.param) == ("context_length_exceeded", "prompt")
    assert "512" in refused.message
    last = one(program, ask(next(name), long_prompt(511), max_tokens=None))
    assert (last.finished.reason, len(last.tokens)) == ("length", 1)


def test_a_full_context_ends_generation_by_length(program: Program) -> None:
    result = one(program, ask(next(name), long_prompt(500), max_tokens=None))
    assert (result.finished.reason, len(result.tokens)) == ("length", 12)


def test_refusals_name_the_field_and_disturb_nobody(program: Program) -> None:
    good, bad_token, empty, bias, stop = islice(name, 5)
    program.send(ask(good, max_tokens=40))
    results = program.generate(
        ask(bad_token, [1, 10**6]), ask(empty, [-1]), ask(bias, logit_bias={10**7: 1.0}), ask(stop, stop=[""])
    )
    assert [result.failed.param for result in results] == ["prompt", "prompt", "logit_bias", "stop"]
    assert {result.failed.code for result in results} == {"invalid_request"}
    assert "1000000" in results[0].failed.message
    program.until(program.ended(good))
    assert program.results[good].finished.usage.completion_tokens == 40


def test_a_line_that_is_no_command_fails_at_most_the_request_it_names(program: Program) -> None:
    named, unknown = islice(name, 2)
    program.write(b"this is not JSON\n[1, 2]\n")
    program.write(json.dumps({"type": "generate", "id": named, "prompt": "text"}).encode() + b"\n")
    program.write(json.dumps({**json.loads(ask(unknown).model_dump_json()), "surprise": 1}).encode() + b"\n")
    program.until(program.ended(named, unknown))
    assert "surprise" in program.results[unknown].failed.message
    assert one(program, ask(next(name))).finished.reason == "length"


# --- several requests ---


def test_more_requests_than_slots_all_finish(program: Program) -> None:
    results = program.generate(
        *(ask(each, f"story {index}", max_tokens=10 + index) for index, each in zip(range(13), name, strict=False))
    )
    assert [len(result.tokens) for result in results] == [10 + index for index in range(13)]


def test_a_late_request_joins_running_ones(start: Start) -> None:
    program = start.slow(slots=2, n_ctx=4096)
    early, late = islice(name, 2)
    program.send(ask(early, max_tokens=2000))
    program.until(lambda: early in program.results and len(program.results[early].tokens) >= 3)
    assert one(program, ask(late, max_tokens=5)).finished.reason == "length"
    assert program.results[early].end is None


def test_running_streams_go_on_while_a_long_prompt_is_computed_and_neither_leaves_a_trace(start: Start) -> None:
    program = start.slow(slots=2, n_ctx=4096, **start.case.small_chunks)
    stream, prompt = ask(next(name), max_tokens=100, temperature=1.0, seed=4), ask(next(name), long_prompt(1200))
    program.send(stream)
    program.until(lambda: stream.id in program.results and len(program.results[stream.id].tokens) >= 3)
    program.send(prompt)
    program.until(lambda: prompt.id in program.results)
    before = len(program.results[stream.id].tokens)
    program.until(lambda: bool(program.results[prompt.id].tokens))
    assert len(program.results[stream.id].tokens) - before > 20
    program.until(program.ended(stream.id, prompt.id))
    for request in (stream, prompt):
        alone = one(program, request.model_copy(update={"id": next(name)}))
        assert alone.tokens == program.results[request.id].tokens


def test_cancel_frees_the_slot_and_is_idempotent(start: Start) -> None:
    program = start.slow(slots=1, n_ctx=4096)
    running, waiting, after = islice(name, 3)
    program.send(ask(running, max_tokens=4000), ask(waiting, max_tokens=4000))
    program.until(lambda: running in program.results and len(program.results[running].tokens) >= 2)
    program.cancel("nobody knows this one")
    program.cancel(waiting)
    program.until(program.ended(waiting))
    assert program.results[waiting].tokens == []
    program.cancel(running)
    program.cancel(running)
    program.until(program.ended(running))
    for request in (running, waiting):
        assert program.results[request].finished.reason == "cancelled"
    assert len(program.results[running].tokens) == program.results[running].finished.usage.completion_tokens
    assert one(program, ask(after)).finished.reason == "length"
    assert program.results[running].after_end == program.results[waiting].after_end == []


def test_cancel_takes_effect_in_the_middle_of_a_prompt(start: Start) -> None:
    program = start.slow(slots=1, n_ctx=4096, **start.case.small_chunks)
    request = next(name)
    program.send(ask(request, long_prompt(3000)))
    program.until(lambda: request in program.results and program.results[request].prefill[-1].processed > 0)
    program.cancel(request)
    program.until(program.ended(request))
    result = program.results[request]
    assert result.finished.reason == "cancelled"
    assert result.prefill[-1].processed < 3000
    assert result.tokens == []


def test_sequences_of_one_prompt_come_together_and_end_each_for_itself(program: Program) -> None:
    first, *others = (ask(next(name), "once upon", max_tokens=20, temperature=1.0, seed=seed) for seed in range(4))
    expected = [result.tokens for result in program.generate(first, *others)]
    again = first.model_copy(update={"id": next(name)})
    also = tuple(Sibling(id=next(name), seed=seed) for seed in range(1, 4))
    program.send(again.model_copy(update={"also": also}))
    program.until(program.ended(again.id, *(each.id for each in also)))
    assert [program.results[each].tokens for each in (again.id, *(each.id for each in also))] == expected
    ids = [next(name) for _ in range(3)]
    siblings = tuple(Sibling(id=each, seed=1) for each in ids[1:])
    program.send(ask(ids[0], [-1]).model_copy(update={"also": siblings}))
    program.until(program.ended(*ids))
    assert [program.results[each].failed.param for each in ids] == ["prompt"] * 3


def test_one_of_several_sequences_of_a_prompt_is_cancelled_alone(start: Start) -> None:
    program = start.slow(slots=2, n_ctx=4096)
    request, sibling = ask(next(name), max_tokens=200), next(name)
    program.send(request.model_copy(update={"also": (Sibling(id=sibling, seed=0),)}))
    program.cancel(sibling)
    program.until(program.ended(request.id, sibling))
    assert program.results[sibling].finished.reason == "cancelled"
    assert len(program.results[request.id].tokens) == 200


@pytest.mark.parametrize("start", SAMPLING, indirect=True)
def test_a_cancel_waits_for_no_text_that_is_being_tokenized(start: Start) -> None:
    """The stream has ended before the last of many long texts is tokenized."""
    program = start.slow(slots=2, n_ctx=8192)
    stream, texts = next(name), [next(name) for _ in range(8)]
    program.send(ask(stream, max_tokens=None))
    program.until(lambda: stream in program.results and len(program.results[stream].tokens) > 0)
    text = "".join(chr(97 + at * at % 23) for at in range(400_000))
    program.send(*(Tokenize(id=each, prompt=(Text(text=text),)) for each in texts), Cancel(id=stream))
    program.until(program.ended(stream))
    assert program.results[stream].finished.reason == "cancelled"
    assert not program.ended(*texts)()
    program.until(program.ended(*texts))


# --- randomness ---


def test_a_seeded_request_gives_the_same_tokens_alone_and_among_fifteen_others(sampling_program: Program) -> None:
    prompt = "the quick brown fox"
    alone = one(sampling_program, ask(next(name), prompt, temperature=1.0, seed=42, max_tokens=48))
    others = [
        ask(each, f"{index} other words", temperature=1.3, seed=index, max_tokens=20 + 3 * index)
        for index, each in zip(range(15), name, strict=False)
    ]
    crowd = sampling_program.generate(
        *others[:7], ask(next(name), prompt, temperature=1.0, seed=42, max_tokens=48), *others[7:]
    )
    assert crowd[7].tokens == alone.tokens
    different = one(sampling_program, ask(next(name), prompt, temperature=1.0, seed=43, max_tokens=48))
    assert different.tokens != alone.tokens


def test_greedy_is_the_same_in_every_slot(sampling_program: Program) -> None:
    results = sampling_program.generate(*(ask(each, "same words", max_tokens=32) for each in islice(name, 16)))
    assert len({tuple(result.tokens) for result in results}) == 1


def test_logit_bias_forces_a_token(sampling_program: Program) -> None:
    result = one(sampling_program, ask(next(name), temperature=1.0, logit_bias={120: 1000.0}, max_tokens=6))
    assert result.tokens == [120] * 6


def test_penalties_change_what_is_chosen(sampling_program: Program) -> None:
    plain = one(sampling_program, ask(next(name), max_tokens=60))
    varied = sampling_program.generate(
        ask(next(name), max_tokens=60, frequency_penalty=2.0),
        ask(next(name), max_tokens=60, presence_penalty=2.0),
        ask(next(name), max_tokens=60, repetition_penalty=1.8),
    )
    assert all(len(set(result.tokens)) > len(set(plain.tokens)) for result in varied)


def test_penalties_count_the_tokens_delivered(sampling_program: Program) -> None:
    for temperature in (0.0, 1.0):
        request = ask(
            next(name),
            seed=3,
            temperature=temperature,
            max_tokens=30,
            repetition_penalty=1.3,
            presence_penalty=0.7,
            frequency_penalty=0.4,
        )
        goes_on_from_everywhere(sampling_program, request)


def test_a_character_that_is_cut_in_two_is_whole_in_the_end(sampling_program: Program) -> None:
    """Only x and bytes of é, € and 😀 may be drawn, so that characters are whole, broken and cut at random."""
    bias = dict.fromkeys("é€😀x".encode(), 10_000.0)
    whole = goes_on_from_everywhere(
        sampling_program,
        ask(next(name), max_tokens=60, temperature=50.0, seed=1, logit_bias=bias, stop=["x\ufffdxxx"]),
    )
    assert not whole.text.isascii()
    assert whole.finished.usage.completion_tokens > 5


def test_an_end_of_generation_token_delivered_ends_the_request(sampling_program: Program) -> None:
    capabilities = sampling_program.capabilities
    assert isinstance(capabilities, Capabilities)
    ends = range(capabilities.vocabulary - 3, capabilities.vocabulary)
    bias = dict.fromkeys((*range(97, 120), *ends), 10_000.0)
    request = ask(next(name), temperature=50.0, seed=8, logit_bias=bias, ignore_eos=False, max_tokens=100)
    assert goes_on_from_everywhere(sampling_program, request).finished.reason == "stop"


def test_an_end_of_generation_token_ends_by_stop_and_can_be_ignored(sampling_program: Program) -> None:
    capabilities = sampling_program.capabilities
    assert isinstance(capabilities, Capabilities)
    end = capabilities.vocabulary - 1
    bias = {end - 2: 1000.0, end - 1: 1000.0, end: 1000.0}
    ended = one(sampling_program, ask(next(name), logit_bias=bias, ignore_eos=False))
    assert (ended.finished.reason, ended.text, len(ended.tokens)) == ("stop", "", 1)
    assert ended.finished.usage.completion_tokens == 1
    ignored = one(sampling_program, ask(next(name), logit_bias=bias, ignore_eos=True, max_tokens=5))
    assert ignored.finished.reason == "length"
    assert ended.tokens[0] not in ignored.tokens


def test_a_prefix_computed_before_is_reused_without_a_trace_in_the_text(
    sampling_program: Program, request: pytest.FixtureRequest
) -> None:
    block = CASES[request.node.callspec.params["sampling_program"]].cache_block
    prompt = long_prompt(300)
    first = one(sampling_program, ask(next(name), prompt, max_tokens=20))
    again = one(sampling_program, ask(next(name), prompt, max_tokens=20))
    longer = one(sampling_program, ask(next(name), prompt + first.tokens[:10], max_tokens=10))
    assert again.tokens == first.tokens
    assert longer.tokens == first.tokens[10:]
    assert again.finished.usage.cached_tokens == 299 // block * block
    assert longer.finished.usage.cached_tokens >= 299 // block * block


# --- grammars ---

SCHEMA = Grammar(
    syntax="json_schema",
    source=json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 8},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["old", "new"]}, "maxItems": 3},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        }
    ),
)
REGEX = Grammar(syntax="regex", source="(yes|no), [0-9]{3}[a-f]{2,6}")
LARK = Grammar(
    syntax="lark", source='start: greeting " " NAME "!"\ngreeting: "hello" | "good day"\nNAME: /[A-Z][a-z]{1,9}/'
)
LONG = Grammar(
    syntax="json_schema", source=json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 100})
)


def constrained(grammar: Grammar, **others: object) -> Generate:
    """A request that the grammar has finished before its 200 tokens are spent."""
    request = ask(next(name), max_tokens=200)
    sampling = request.sampling.model_copy(
        update={key: others.pop(key) for key in ("temperature", "seed") & others.keys()}
    )
    return request.model_copy(update={"grammar": grammar, "sampling": sampling, **others})


def matches(grammar: Grammar, text: str) -> bool:
    if grammar is SCHEMA:
        person = json.loads(text)
        assert list(person) == ["name", "age", "tags"]
        return len(person["name"]) <= 8 and person["age"] in range(151) and {*person["tags"]} <= {"old", "new"}
    pattern = REGEX.source if grammar is REGEX else "(hello|good day) [A-Z][a-z]{1,9}!"
    return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_whole_output_matches_the_grammar(program: Program, temperature: float, ignore_eos: bool) -> None:
    grammars = [grammar for grammar in (SCHEMA, REGEX, LARK) for _ in range(3)]
    results = program.generate(
        *(
            constrained(grammar, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
            for seed, grammar in enumerate(grammars)
        )
    )
    for grammar, result in zip(grammars, results, strict=True):
        assert matches(grammar, result.text), result.text
        assert (result.finished.reason, result.finished.stop) == ("stop", None)
        assert result.finished.usage.completion_tokens == len(result.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_advanced_over_the_tokens_delivered(program: Program, temperature: float) -> None:
    for grammar in (SCHEMA, REGEX, LARK):
        goes_on_from_everywhere(program, constrained(grammar, temperature=temperature, seed=3))


def test_a_runner_killed_in_the_middle_of_json_leaves_what_another_completes(start: Start) -> None:
    request = constrained(LONG, temperature=1.0, seed=11, max_tokens=4000)
    (whole,) = start.loaded(slots=1, n_ctx=8192).generate(request)
    killed = start.slow(slots=1, n_ctx=8192)
    killed.send(request)
    killed.until(lambda: request.id in killed.results and len(killed.results[request.id].tokens) > 30)
    killed.process.kill()
    assert killed.drain() == -signal.SIGKILL
    before = killed.results[request.id]
    assert before.end is None
    delivered = request.model_copy(update={"delivered": tuple(before.tokens)})
    (after,) = start.loaded(slots=1, n_ctx=8192).generate(delivered)
    assert before.tokens + after.tokens == whole.tokens
    assert before.text + after.text == whole.text
    assert after.finished.reason == "stop"
    assert len(json.loads(whole.text)) >= 100


def test_a_constrained_request_gives_the_same_tokens_alone_and_among_others(sampling_program: Program) -> None:
    request = constrained(SCHEMA, temperature=1.0, seed=42)
    alone = one(sampling_program, request)
    crowd = [constrained(grammar, temperature=1.2, seed=seed) for seed, grammar in enumerate([LARK, REGEX, SCHEMA] * 4)]
    free = [ask(next(name), temperature=1.0, seed=seed, max_tokens=40) for seed in range(3)]
    results = sampling_program.generate(*crowd, request.model_copy(update={"id": next(name)}), *free)
    assert results[len(crowd)].tokens == alone.tokens
    assert alone.tokens != results[2].tokens


WAYS_TO_CHOOSE: list[dict[str, JsonValue]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 0.8, "frequency_penalty": -0.3},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 1.0, "logit_bias": {"101": 2.5, "32": -100.0}, "frequency_penalty": 0.5},
]


def test_twins_choose_alike(folder: Path) -> None:
    """With every parameter and every kind of grammar, all in one batch."""
    ways = [SamplingParams.model_validate({"seed": seed, **way}) for seed, way in enumerate(WAYS_TO_CHOOSE)]
    free = [ask(next(name), max_tokens=60).model_copy(update={"sampling": way}) for way in ways]
    requests = free + [
        constrained(grammar, temperature=1.0, seed=seed) for seed in range(4) for grammar in (SCHEMA, REGEX, LARK)
    ]
    tokens: list[list[list[int]]] = []
    for kind in (name for name, case in CASES.items() if case.samples and Path(case.command[0]).exists()):
        start = Start(CASES[kind], folder, [])
        with start.bare() as program:
            program.load(start.load_command(n_ctx=512))
            tokens.append([result.tokens for result in program.generate(*requests)])
    assert all(each == tokens[0] for each in tokens)


def test_a_stop_string_or_max_tokens_may_cut_constrained_output(program: Program) -> None:
    grammar = Grammar(syntax="regex", source="a{30}")
    cut = one(program, constrained(grammar, max_tokens=3))
    assert (cut.finished.reason, len(cut.tokens)) == ("length", 3)
    stopped = one(program, constrained(grammar, stop=("aaa",)))
    assert (stopped.finished.reason, stopped.finished.stop, stopped.text) == ("stop", "aaa", "")


def test_where_only_an_end_is_left_the_output_ends_even_if_ends_are_ignored(program: Program) -> None:
    assert program.capabilities is not None
    end = program.capabilities.eos_token
    for ignore_eos, tokens in ((True, 2), (False, 3)):
        grammar = Grammar(syntax="lark", source=f'start: "a" "b" {end}?')
        result = one(program, constrained(grammar, ignore_eos=ignore_eos))
        assert (result.text, result.finished.reason) == ("ab", "stop")
        assert len(result.tokens) <= tokens
        nothing = one(program, constrained(Grammar(syntax="lark", source='start: ""'), ignore_eos=ignore_eos))
        assert (nothing.text, nothing.finished.reason) == ("", "stop")


def test_an_end_is_allowed_where_the_output_may_end_and_nowhere_else(sampling_program: Program) -> None:
    assert sampling_program.capabilities is not None
    vocabulary = sampling_program.capabilities.vocabulary
    bias = dict.fromkeys(range(vocabulary - 3, vocabulary), 1000.0)
    sampling = SamplingParams(seed=0, temperature=0, logit_bias=bias)
    request = constrained(Grammar(syntax="regex", source="[ab]{5}[cd]*"), ignore_eos=False, sampling=sampling)
    result = one(sampling_program, request)
    assert re.fullmatch("[ab]{5}", result.text)
    assert result.finished.reason == "stop"
    assert result.tokens[-1] >= vocabulary - 3


def test_control_tokens_are_reached_by_reference_and_never_by_their_text(program: Program) -> None:
    assert program.capabilities is not None
    text, token = program.capabilities.special_tokens[0], program.capabilities.special_ids[0]
    spelt = one(program, constrained(Grammar(syntax="lark", source=f'start: "x{text}y"'), show_special=True))
    assert spelt.text == f"x{text}y"
    assert token not in spelt.tokens
    for reference in (text, f"<[{token}]>"):
        grammar = Grammar(syntax="lark", source=f'start: "x" {reference} "y"')
        meant = one(program, constrained(grammar))
        assert (meant.text, token in meant.tokens) == ("xy", True)
        shown = goes_on_from_everywhere(program, constrained(grammar, show_special=True))
        assert (shown.text, shown.tokens) == (f"x{text}y", meant.tokens)
        stopped = one(program, constrained(grammar, show_special=True, stop=(text[1:3],)))
        assert (stopped.text, stopped.finished.stop) == (f"x{text[0]}", text[1:3])


BAD_GRAMMARS = {
    "no JSON": Grammar(syntax="json_schema", source="{"),
    "no schema": Grammar(syntax="json_schema", source="[1]"),
    "a type that does not exist": Grammar(syntax="json_schema", source='{"type": "number of things"}'),
    "nothing matches": Grammar(syntax="json_schema", source='{"$ref": "#"}'),
    "nested deeply": Grammar(syntax="json_schema", source='{"items":' * 20_000 + "{}" + "}" * 20_000),
    "an open bracket": Grammar(syntax="regex", source="[a-"),
    "an unknown rule": Grammar(syntax="lark", source="start: nowhere"),
    "no such token": Grammar(syntax="lark", source="start: <|nonsense|>"),
    "for ever": Grammar(
        syntax="lark",
        source="start: A\nA: " + " & ".join(f"/(.*\\n)*[a-z]*x{{{count}}}[^b]*/" for count in range(1, 30)),
    ),
}


def test_a_bad_grammar_fails_its_own_request_only(start: Start) -> None:
    program = start.slow(slots=2, n_ctx=4096)
    good = next(name)
    program.send(ask(good, max_tokens=4000))
    bad = program.generate(*(constrained(grammar) for grammar in BAD_GRAMMARS.values()))
    for what, result in zip(BAD_GRAMMARS, bad, strict=True):
        assert (result.failed.code, result.failed.param) == ("invalid_request", "grammar"), what
        assert result.failed.message.startswith("grammar: "), what
        assert (result.prefill, result.after_end) == ([], []), what
    program.cancel(good)
    program.until(program.ended(good))
    assert program.results[good].finished.reason in ("cancelled", "length")
    assert matches(REGEX, one(program, constrained(REGEX)).text)


def test_a_constrained_request_can_be_cancelled_at_once(program: Program) -> None:
    """Whether its grammar is being compiled or it generates already."""
    requests = [constrained(LONG, max_tokens=None) for _ in range(3)]
    for request in requests:
        program.send(request)
        program.cancel(request.id)
    program.until(program.ended(*(request.id for request in requests)))
    for request in requests:
        assert program.results[request.id].finished.reason == "cancelled"
        assert program.results[request.id].after_end == []


# --- log-probabilities ---


def test_logprobs_are_those_of_the_model_alone(program: Program) -> None:
    plain = ask(next(name), max_tokens=24).model_copy(update={"logprobs": 5, "show_special": True})
    result = one(program, plain)
    assert len(result.logprobs) == len(result.tokens)
    assert [each.chosen.token for each in result.logprobs] == result.tokens
    assert b"".join(bytes(each.chosen.bytes) for each in result.logprobs).decode(errors="replace") == result.text
    for each in result.logprobs:
        known = [top.logprob for top in each.top if top.logprob is not None]
        assert len(known) == 5
        assert known == sorted(known, reverse=True)
        assert sum(map(math.exp, known)) <= 1 + 1e-6
        assert each.top[0] == each.chosen
    assert all(each.prompt_logprobs == [] for each in (result, one(program, ask(next(name)))))
    changed = constrained(REGEX, temperature=1.7, seed=1, logprobs=5)
    assert one(program, changed).logprobs[0].top == result.logprobs[0].top


def test_logprobs_of_all_tokens_sum_up_to_one(sampling_program: Program) -> None:
    found: dict[int, float] = {}
    for token in range(320):
        request = ask(next(name), max_tokens=1, ignore_eos=False, logit_bias={token: 1e6})
        (place,) = one(sampling_program, request.model_copy(update={"logprobs": 0})).logprobs
        assert place.chosen.logprob is not None
        assert place.top == ()
        found[place.chosen.token] = place.chosen.logprob
    assert len(found) == 320
    assert abs(sum(map(math.exp, found.values())) - 1) < 1e-4


def test_no_logprobs_are_told_unasked(program: Program) -> None:
    result = one(program, ask(next(name)))
    assert (result.logprobs, result.prompt_logprobs) == ([], [])


def test_prompt_logprobs_are_what_generating_the_prompt_would_tell(program: Program) -> None:
    prompt = long_prompt(90)
    first = one(program, ask(next(name), prompt, max_tokens=20).model_copy(update={"logprobs": 3}))
    request = ask(next(name), prompt + first.tokens, max_tokens=4).model_copy(update={"prompt_logprobs": 3})
    for result in program.generate(request, request.model_copy(update={"id": next(name)})):
        (told,) = result.prompt_logprobs
        assert [item.chosen.token for item in told.items] == prompt + first.tokens
        assert (told.items[0].chosen.logprob, told.items[0].top) == (None, ())
        assert all(item.chosen.logprob is not None and len(item.top) == 3 for item in told.items[1:])
        for mine, theirs in zip(told.items[90:], first.logprobs, strict=True):
            assert mine.chosen.bytes == theirs.chosen.bytes
            assert abs((mine.chosen.logprob or 0) - (theirs.chosen.logprob or 0)) < 1e-3
        assert result.finished.usage.cached_tokens == 0


def test_the_logprobs_of_a_long_prompt_come_in_parts(program: Program) -> None:
    request = ask(next(name), long_prompt(400), max_tokens=2).model_copy(update={"prompt_logprobs": 20})
    result = one(program, request)
    assert len(result.prompt_logprobs[0].items) == 400
    assert result.parts >= 400 * 21 / PART_LOGPROBS
    assert len(result.tokens) == 2
    (alone,) = one(
        program, ask(next(name), [97], max_tokens=0).model_copy(update={"prompt_logprobs": 3})
    ).prompt_logprobs
    assert [item.chosen.logprob for item in alone.items] == [None]


def test_more_logprobs_of_a_prompt_than_can_be_told_are_refused(program: Program) -> None:
    most = MAX_PROMPT_LOGPROBS // 21
    request = ask(next(name), [97] * (most + 1)).model_copy(update={"prompt_logprobs": 20})
    refused = one(program, request).failed
    assert (refused.code, refused.param) == ("invalid_request", "prompt_logprobs")
    assert str(most) in refused.message


def test_a_line_that_is_too_long_fails_the_request_it_names(program: Program) -> None:
    named = next(name)
    program.write(b'{"type":"generate","id":"%b","prompt":[{"text":"' % named.encode())
    for _ in range(LINE_BYTES >> 20):
        program.write(b"a" * (1 << 20))
    program.write(b'"}],"sampling":{"seed":0}}\n')
    program.until(program.ended(named))
    refused = program.results[named].failed
    assert refused.code == "invalid_request"
    assert str(LINE_BYTES) in refused.message
    assert one(program, ask(next(name))).finished.reason == "length"


@pytest.mark.parametrize("kind", SAMPLING)
def test_prompt_logprobs_are_those_of_teacher_forcing(kind: str, folder: Path, tmp_path: Path) -> None:
    case, prompt = CASES[kind], long_prompt(150)
    start = Start(case, folder, [])
    load = start.load_command(n_ctx=512)
    command = Score(load=load, prompts=(tuple(prompt),), directory=str(tmp_path))
    subprocess.run(
        [*case.command, "--score"], input=command.model_dump_json().encode(), stdout=subprocess.DEVNULL, check=True
    )
    expected = np.load(tmp_path / "0.npy")
    with start.bare() as program:
        program.load(load)
        request = ask(next(name), prompt, max_tokens=0).model_copy(update={"prompt_logprobs": 20})
        (told,) = one(program, request).prompt_logprobs
    for row, item in zip(expected, told.items[1:], strict=False):
        known = {each.token: each.logprob for each in (item.chosen, *item.top)}
        assert all(abs(row[token] - (logprob or 0)) < 1e-3 for token, logprob in known.items())
        assert item.top[0].token == row.argmax()


def test_a_request_for_no_tokens_has_its_prompt_computed(program: Program) -> None:
    request = ask(next(name), long_prompt(120), max_tokens=0).model_copy(update={"prompt_logprobs": 0})
    result = one(program, request)
    assert (result.finished.reason, result.tokens, result.text) == ("length", [], "")
    assert result.finished.usage.prompt_tokens == result.prefill[-1].processed == 120
    assert result.finished.usage.completion_tokens == 0
    assert len(result.prompt_logprobs[0].items) == 120
    assert one(program, ask(next(name), long_prompt(120), max_tokens=0)).prompt_logprobs == []


# --- ending ---


def test_shutdown_fails_what_is_in_flight_and_exits_cleanly(start: Start) -> None:
    program = start.slow(slots=1, n_ctx=4096)
    running, waiting = islice(name, 2)
    program.send(ask(running, max_tokens=4000), ask(waiting))
    program.until(lambda: running in program.results and len(program.results[running].tokens) > 0)
    assert program.shutdown() == 0
    assert {program.results[each].failed.code for each in (running, waiting)} == {"shutdown"}
    assert program.states[-2:] == ["ShuttingDown", "Shutdown"]


def test_a_runner_whose_input_closes_exits(start: Start) -> None:
    program = start.slow(slots=1, n_ctx=4096)
    program.send(ask(next(name), max_tokens=4000))
    assert program.process.stdin is not None
    program.process.stdin.close()
    assert program.process.wait(10) is not None


def test_heartbeats_come_while_idle_and_while_busy(start: Start) -> None:
    program = start.slow(slots=1, n_ctx=4096)
    program.until(lambda: program.heartbeats >= 1)
    program.send(*(ask(next(name), max_tokens=4000) for _ in range(3)))
    before = program.heartbeats
    program.until(lambda: program.heartbeats >= before + 2)
