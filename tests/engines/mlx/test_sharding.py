"""One MLX model divided between processes: the text is that of one process, and all of them end together.

The contract's own tests run here too, on ranks of both kinds.
"""

import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import psutil
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Embed, Estimate, Generate, Load, Peer, SamplingParams
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_mlx.kv_cache import LayerCache
from exo.worker.runner_mlx.loading.estimate import estimate
from exo.worker.runner_mlx.loading.loader import check
from exo.worker.runner_mlx.loading.options import read_options
from exo.worker.runner_mlx.ranks.pipeline import Layer, chained
from tests.contract import test_commands as commands_contract
from tests.contract import test_generation as generation_contract
from tests.contract import test_grammar as grammar_contract
from tests.contract import test_logprobs as logprobs_contract
from tests.contract import test_sampling as sampling_contract
from tests.contract.cases import long_prompt
from tests.support.peers import CABLE, cable, needs_namespaces, parts, peer
from tests.support.program import Program, Result, ask, names, runner_command
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.shape import Architecture
from tests.support.twins import Models, Start, mlx_load

END_SECONDS = 60
"""How long a process may take to end with the others; reached only when something is broken."""

BY_TENSOR: dict[str, JsonValue] = {"tensor_parallel_size": 2}
BY_PIPELINE: dict[str, JsonValue] = {"pipeline_parallel_size": 2}

name = names()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(models: Models) -> Iterator[Program]:
    """The same model in one process."""
    start = Start(models)
    yield start.mlx(models.mlx("llama"), slots=4, n_ctx=512)
    start.stop()


@pytest.fixture(scope="module", params=[BY_TENSOR, BY_PIPELINE], ids=["tensor", "pipeline"])
def program(request: pytest.FixtureRequest, models: Models) -> Iterator[Program]:
    start = Start(models)
    yield start.mlx(models.mlx("llama"), slots=16, n_ctx=512, **request.param)
    start.stop()


@pytest.fixture
def sampling_program(program: Program) -> Program:
    return program


@pytest.fixture
def start(models: Models) -> Iterator[Start]:
    starter = Start(models)
    yield starter
    starter.stop()


# --- the contract ---

test_accepted_answered_and_ended_once = generation_contract.test_a_request_is_accepted_answered_and_ended_once
test_full_context = generation_contract.test_a_full_context_ends_generation_by_length
test_refusals = commands_contract.test_refusals_name_the_field_and_disturb_nobody
test_seeded_among_others = sampling_contract.test_a_seeded_request_gives_the_same_tokens_alone_and_among_fifteen_others
test_every_slot = sampling_contract.test_greedy_is_the_same_in_every_slot
test_penalties = sampling_contract.test_penalties_change_what_is_chosen
test_grammars_and_delivered_tokens = grammar_contract.test_a_grammar_is_advanced_over_the_tokens_delivered
test_cancelled_at_once = grammar_contract.test_a_constrained_request_can_be_cancelled_at_once
test_logprobs = logprobs_contract.test_logprobs_are_those_of_the_model_alone
test_prompt_logprobs = logprobs_contract.test_prompt_logprobs_are_what_generating_the_prompt_would_tell
test_no_tokens = logprobs_contract.test_a_request_for_no_tokens_has_its_prompt_computed


# --- the same as one process ---


def crowd() -> list[Generate]:
    """More requests than a runner with four slots takes at once, some of which share a prefix."""
    prompts = [long_prompt(length) for length in (9, 14, 200, 150, 33, 200)]
    kinds = [
        SamplingParams(seed=0, temperature=0),
        SamplingParams(seed=1, temperature=0, frequency_penalty=0.7),
        SamplingParams(seed=2, temperature=0),
        SamplingParams(seed=3, temperature=0.9, top_k=20, top_p=0.9),
        SamplingParams(seed=4, temperature=1.3, repetition_penalty=1.3),
        SamplingParams(seed=5, temperature=0.8, min_p=0.02),
    ]
    return [
        ask(next(name), prompt, max_tokens=10 + 13 * sampling.seed).model_copy(
            update={"sampling": sampling, "logprobs": 5, "prompt_logprobs": 2}
        )
        for prompt, sampling in zip(prompts, kinds, strict=True)
    ]


def furthest(results: list[Result], others: list[Result]) -> float:
    """The largest difference of two log-probabilities, of texts that are equal."""
    assert [result.text for result in results] == [other.text for other in others]
    assert [result.tokens for result in results] == [other.tokens for other in others]
    found = [
        abs((one.chosen.logprob or 0) - (same.chosen.logprob or 0))
        for result, other in zip(results, others, strict=True)
        for one, same in zip(
            (*result.prompt_logprobs[0].items, *result.logprobs),
            (*other.prompt_logprobs[0].items, *other.logprobs),
            strict=True,
        )
    ]
    assert len(found) > 400
    return max(found)


def test_texts_and_logprobs_are_those_of_one_process(alone: Program, program: Program) -> None:
    assert furthest(program.generate(*crowd()), alone.generate(*crowd())) < 1e-4


def test_vectors_are_those_of_one_process(alone: Program, program: Program) -> None:
    texts = [tuple(long_prompt(length)) for length in (300, 5, 90)]
    for text in texts:
        (divided,) = program.generate(embed(text))
        (whole,) = alone.generate(embed(text))
        pairs = zip(divided.embedded.vector, whole.embedded.vector, strict=True)
        assert max(abs(one - other) for one, other in pairs) < 1e-5


def embed(tokens: tuple[int, ...]) -> Embed:
    return Embed(id=next(name), prompt=tokens)


def test_sliding_windows_and_a_layer_split_that_is_not_even(start: Start, tmp_path: Path) -> None:
    """Seven layers by three ranks, of which one both receives and sends; windows of 16 tokens; numbers of two types."""
    folder = tmp_path / "gemma3"
    write_mlx(folder, Shape("gemma3", layers=7, dtype="F16"))
    whole = start.mlx(folder, n_ctx=512, dtype=None)
    divided = start.mlx(folder, n_ctx=512, dtype=None, pipeline_parallel_size=3)
    assert furthest(divided.generate(*crowd()[1:4]), whole.generate(*crowd()[1:4])) < 1e-4


def test_a_prefix_is_reused_on_all_ranks(program: Program) -> None:
    first, again, branch = (ask(next(name), long_prompt(300), max_tokens=20) for _ in range(3))
    branch = branch.model_copy(update={"prompt": (*long_prompt(170), *range(60, 90))})
    tokens = program.generate(first)[0].tokens
    results = [program.generate(request)[0] for request in (again, branch)]
    assert results[0].tokens == tokens
    assert [result.finished.usage.cached_tokens for result in results] == [299, 170]


def test_it_says_what_it_runs_on(program: Program) -> None:
    assert program.capabilities is not None
    kind = "tensor" if "tensor" in program.capabilities.devices[0] else "pipeline"
    assert program.capabilities.devices == (f"CPU (rank 0 of 2, {kind})", f"CPU (rank 1 of 2, {kind})")
    assert len(ranks(program.process.pid)) == 1


# --- all end together ---


def ranks(runner: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(runner).children() if "runner_mlx.rank" in " ".join(child.cmdline())]


def gone(process: psutil.Process) -> bool:
    """An orphan that has exited may stay a zombie for as long as init likes."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_until_gone(process: psutil.Process) -> None:
    try:
        process.wait(END_SECONDS)
    except psutil.TimeoutExpired:
        assert gone(process), process


def streaming(models: Models, log: Path, **table: JsonValue) -> Program:
    """A runner in the middle of a text; its standard error goes to a file."""
    command = " ".join(runner_command(RUNNERS["mlx"].module))
    program = Program(["sh", "-c", f"exec {command} 2> {log}"])
    program.load(mlx_load(models.mlx("llama"), **{**BY_TENSOR, **table}))
    request = next(name)
    program.send(ask(request, max_tokens=4000))
    program.until(lambda: request in program.results and len(program.results[request].tokens) > 3)
    return program


def test_a_rank_that_dies_takes_the_runner_with_it(models: Models, tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    with streaming(models, log) as program:
        (rank,) = ranks(program.process.pid)
        rank.kill()
        status = program.drain()
        # MLX's ring notices the closed socket as well, and its threads may crash the process before ours ends it.
        assert status in (1, -signal.SIGSEGV, -signal.SIGABRT)
        says = "rank 1 of 2 was killed by SIGKILL; the runner cannot compute without it"
        assert status != 1 or says in log.read_text()
        assert all(result.end is None for result in program.results.values())


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_do_not_outlive_a_runner_that_is_killed(models: Models, tmp_path: Path, stopped: bool) -> None:
    with streaming(models, tmp_path / "stderr") as program:
        (rank,) = ranks(program.process.pid)
        if stopped:
            rank.send_signal(signal.SIGSTOP)
        program.process.kill()
        wait_until_gone(rank)


def test_ranks_end_with_the_runner(models: Models, tmp_path: Path) -> None:
    with streaming(models, tmp_path / "stderr") as program:
        (rank,) = ranks(program.process.pid)
        assert program.shutdown() == 0
        wait_until_gone(rank)
        assert (tmp_path / "stderr").read_text() == ""


def test_a_rank_that_dies_while_it_starts_is_told_of(models: Models) -> None:
    with Program(runner_command(RUNNERS["mlx"].module)) as program:
        program.send(mlx_load(models.mlx("llama"), **BY_TENSOR))
        program.until(lambda: "Loading" in program.states)
        while not (found := ranks(program.process.pid)):
            pass
        found[0].kill()
        assert program.drain() == 1
        assert program.failure is not None
        assert program.failure.message == "rank 1 of 2 could not start: it was killed by SIGKILL"


def test_a_stream_goes_on_after_a_rank_was_killed(tmp_path: Path) -> None:
    write_mlx(tmp_path / "tiny", Shape())
    table: dict[str, JsonValue] = {"path": str(tmp_path / "tiny"), "dtype": "float32", "n_ctx": 1024}
    for card, divided in (("whole", {}), ("divided", BY_TENSOR)):
        write_card(tmp_path, card, {"mlx": {**table, **divided}}, backends=["MlxCpu"])
    body = {"prompt": "once upon a time", "max_tokens": 200, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    with ServeProgram(tmp_path) as server:
        reply = server.complete("whole", **body)
        assert reply.status_code == 200, reply.text
        text, killed = "", False
        with server.client.stream(
            "POST", "/v1/completions", json={"model": "divided", "stream": True, **body}
        ) as events:
            for line in events.iter_lines():
                if not line.startswith("data: {"):
                    continue
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if len(text) > 100 and not killed:
                    (rank,) = [each for each in server.children() if "runner_mlx.rank" in " ".join(each.cmdline())]
                    rank.kill()
                    killed = True
        assert killed
        assert text == reply.json()["choices"][0]["text"]


# --- on several hosts ---


def on_hosts(folder: Path, *hosts: Peer, **table: JsonValue) -> Load:
    return mlx_load(folder, n_ctx=512, **table).model_copy(update={"peers": hosts})


@pytest.mark.parametrize(("table", "kind"), [({}, "pipeline"), (BY_TENSOR, "tensor")])
def test_ranks_on_other_hosts_compute_what_one_process_does(
    alone: Program, models: Models, table: dict[str, JsonValue], kind: str
) -> None:
    with Program(runner_command(RUNNERS["mlx"].module)) as program:
        found = program.load(on_hosts(models.mlx("llama"), peer(RUNNERS["mlx"].module), slots=4, **table))
        assert found.devices == (f"CPU (rank 0 of 2, {kind})", f"far/CPU (rank 1 of 2, {kind})")
        assert furthest(program.generate(*crowd()), alone.generate(*crowd())) < 1e-4
        request = next(name)
        program.send(ask(request, max_tokens=400))
        program.until(lambda: request in program.results and len(program.results[request].tokens) > 3)
        (rank,) = parts(program.process.pid, "--rank")
        rank.kill()
        assert program.drain() != 0
        assert program.results[request].end is None


@needs_namespaces
def test_hosts_that_only_a_cable_joins_compute_together(alone: Program, models: Models) -> None:
    with cable() as hosts:
        far = peer(RUNNERS["mlx"].module, hosts.prefix(hosts.there), address=CABLE[1])
        with Program((*hosts.prefix(hosts.here), *runner_command(RUNNERS["mlx"].module))) as program:
            program.load(on_hosts(models.mlx("llama"), far, slots=4))
            assert furthest(program.generate(*crowd()), alone.generate(*crowd())) < 1e-4
            (rank,) = parts(program.process.pid, "--rank")
            hosts.cut()
            program.process.kill()
            wait_until_gone(rank)


@pytest.mark.parametrize(
    ("host", "table", "says"),
    [
        (peer("none"), {"tensor_parallel_size": 4}, "tensor_parallel_size is 4: each of the 2 hosts has one process"),
        (peer("none", address="8.8.8.8"), {}, "8.8.8.8 is no address of a private network"),
        (
            Peer(name="far", command=("false",), address="127.0.0.1"),
            {},
            "rank 1 of 2 on far could not start: it exited",
        ),
        (
            Peer(name="far", command=("echo", "up 127.0.0.1:1 mlx 0.1"), address="127.0.0.1"),
            {},
            "rank 1 of 2 on far could not join: it has mlx 0.1 --rank ring 127.0.0.1, and rank 0 has mlx",
        ),
    ],
)
def test_hosts_that_cannot_be_used_are_named(
    models: Models, host: Peer, table: dict[str, JsonValue], says: str
) -> None:
    with Program(runner_command(RUNNERS["mlx"].module)) as program:
        program.send(on_hosts(models.mlx("llama"), host, **table))
        assert program.drain() != 0
        assert program.failure is not None
        assert says in program.failure.message


def test_estimates_say_what_each_host_takes(models: Models) -> None:
    one = estimate(Estimate(load=on_hosts(models.mlx("llama"), **BY_PIPELINE))).choices[0]
    two = estimate(Estimate(load=on_hosts(models.mlx("llama"), peer("none")))).choices[0]
    assert two.devices.keys() == {"far/memory"}
    assert two.host + two.devices["far/memory"] == one.host


# --- refusals and estimates ---


@pytest.mark.parametrize(
    "table", [{"tensor_parallel_size": 0}, {"pipeline_parallel_size": 17}, {**BY_TENSOR, **BY_PIPELINE}]
)
def test_settings_that_cannot_be(table: dict[str, JsonValue]) -> None:
    with pytest.raises(LoadError, match="parallel_size"):
        read_options(table)


@pytest.mark.parametrize(
    ("architecture", "table", "says"),
    [
        ("llama", {"tensor_parallel_size": 3}, "tensor_parallel_size is 3: the model's num_attention_heads is 4,"),
        ("llama", {"tensor_parallel_size": 4}, "tensor_parallel_size is 4: the model's num_key_value_heads is 2,"),
        ("llama", {"pipeline_parallel_size": 3}, "pipeline_parallel_size is 3: the model has 2 layers"),
        ("gemma3", BY_TENSOR, "tensor_parallel_size is 2: mlx-lm cannot divide the layers of gemma3_text"),
    ],
)
def test_models_that_cannot_be_divided(
    models: Models, architecture: Architecture, table: dict[str, JsonValue], says: str
) -> None:
    with pytest.raises(LoadError, match=re.escape(says)):
        check(mlx_load(models.mlx(architecture), **table))


class Doubling:
    """A network whose layers are divided only if nothing happens between them."""

    def __init__(self, between: float) -> None:
        self.layers: list[Layer] = [lambda states, *_, **__: states * 2 for _ in range(3)]
        self._between = between

    def __call__(self, inputs: mx.array, cache: Sequence[LayerCache], /) -> mx.array:
        states = inputs
        for layer in self.layers:
            states = layer(states)
            states = states if self._between == 0 else states + self._between
        return states


def test_only_a_plain_chain_of_layers_is_divided() -> None:
    assert chained(Doubling(0), [None] * 3) == [mx.int32] * 3
    assert chained(Doubling(1), [None] * 3) is None


def estimated(load: Load) -> Mapping[str, int]:
    return estimate(Estimate(load=load)).choices[0].parts


def test_estimates_count_what_every_rank_takes(models: Models) -> None:
    embedding = 320 * 64 * 4
    whole = estimated(mlx_load(models.mlx("gemma3")))
    divided = estimated(mlx_load(models.mlx("gemma3"), pipeline_parallel_size=3))
    assert divided["process"] == 3 * whole["process"]
    assert divided["KV cache"] == whole["KV cache"]
    assert divided["weights"] == whole["weights"] + embedding
    whole, divided = estimated(mlx_load(models.mlx("llama"))), estimated(mlx_load(models.mlx("llama"), **BY_TENSOR))
    assert divided["KV cache"] == whole["KV cache"]
    assert divided["weights"] == whole["weights"] + 2 * embedding + 5 * 64 * 4
