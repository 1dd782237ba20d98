"""The vLLM runner's own environment, and the server without it, with a broken one, and with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from pydantic import JsonValue
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Estimate, Grammar, Load
from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_vllm.limits import check_limits
from exo.worker.runner_vllm.options import read_options
from exo.worker.supervisor.host_probe import probe_host
from tests.conftest import needs_vllm
from tests.e2e.test_replay import BODY, streamed, texts_of, whole
from tests.support.program import Program, Result, ask, names
from tests.support.server import ServeProgram, environment, without_vllm, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.twins import FLOAT32

VLLM = RUNNERS["vllm"]
TWIN = Shape(head_dim=64)

pytestmark = needs_vllm

name = names()

CONTRACT_ALONE = """
import os
import sys
before = dict(os.environ)
for package in ("fastapi", "starlette", "uvicorn", "typer", "httpx", "jinja2", "llama_cpp", "mlx", "mlx_lm", "rich"):
    assert package not in sys.modules
    sys.modules[package] = None
import exo.worker.runner_vllm.__main__
import exo.worker.runner_vllm.runner
import exo.worker.runner_vllm.score
assert not {"torch", "transformers", "vllm"} & set(sys.modules)
assert dict(os.environ) == before, "importing the runner has changed the environment"
"""


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    write_mlx(tmp_path / "twin", TWIN)
    return tmp_path / "twin"


def load_command(twin: Path, **table: JsonValue) -> Load:
    return Load(
        model_id="test/tiny", backend="Vllm", table={"path": str(twin), "dtype": "float32", "threads": 1, **table}
    )


# --- the environment ---


def test_the_runner_needs_nothing_of_the_server_and_no_engine_before_it_loads() -> None:
    subprocess.run([VLLM.interpreter, "-c", CONTRACT_ALONE], check=True)


def test_its_environment_is_beside_the_one_that_exo_runs_in() -> None:
    assert VLLM.interpreter == str(Path(sys.prefix).parent / ".venv-vllm" / "bin" / "python")
    assert RUNNERS["cuda"].interpreter == sys.executable


async def probed(*command: str | Path) -> Probe:
    return (await probe_host({"vllm": [str(part) for part in command]})).probes["vllm"]


async def test_what_is_in_the_environment_is_told() -> None:
    probe = await probed(*VLLM.command, "--probe")
    assert (probe.installed, probe.remedy) == (True, "")
    assert probe.version.startswith("vllm")
    assert probe.backends == ("Vllm",)


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return path


async def test_an_absent_or_broken_environment_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    absent = await probed(tmp_path / "nothing" / "python", *VLLM.command[1:], "--probe")
    broken = await probed(script(tmp_path / "broken", "echo no such library >&2", "exit 3"), "--probe")
    empty = await probed(sys.executable, *VLLM.command[1:], "--probe")
    for probe, why in ((absent, "did not start"), (broken, "no such library"), (empty, "vLLM is not installed")):
        assert not probe.installed
        assert why in probe.notes[0]
        assert probe.remedy == "exo setup vllm"


def test_a_vllm_that_cannot_be_imported_is_told_by_doctor_and_by_loading(tmp_path: Path, twin: Path) -> None:
    (tmp_path / "in_front" / "vllm").mkdir(parents=True)
    (tmp_path / "in_front" / "vllm" / "__init__.py").write_text("raise ImportError('libcudart.so.13 is missing')")
    python = script(
        tmp_path / ".venv-vllm" / "bin" / "python",
        f'PYTHONPATH={tmp_path / "in_front"} exec {VLLM.interpreter} "$@"',
    )
    doctor = subprocess.run(
        [without_vllm(tmp_path), "-m", "exo", "doctor"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "runner vllm: vLLM: not usable" in doctor.stdout
    assert "libcudart.so.13 is missing" in " ".join(doctor.stdout.split())
    assert "exo setup vllm" in doctor.stdout
    with Program([str(python), *VLLM.command[1:]]) as program:
        program.send(load_command(twin))
        assert program.drain() != 0
        assert program.failure is not None
        assert program.failure.code == "model_load_failed"
        assert "libcudart.so.13 is missing" in program.failure.message


# --- the runner ---


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One process, which has loaded the model for a context longer than it was trained for."""
    twin = tmp_path_factory.mktemp("models") / "twin"
    write_mlx(twin, TWIN)
    with Program(VLLM.command) as program:
        program.load(load_command(twin, max_model_len=5000))
        yield program


def test_a_context_longer_than_the_model_was_trained_for_is_computed_in_full(alone: Program) -> None:
    assert alone.capabilities is not None
    assert alone.capabilities.context_length == 5000
    (result,) = alone.generate(ask(next(name), [97 + at % 23 for at in range(4990)], max_tokens=None))
    assert (len(result.tokens), result.finished.reason) == (10, "length")


def test_two_processes_that_share_a_model_choose_what_one_does(alone: Program, twin: Path) -> None:
    """Neither of the runners listens to the network, and nothing is left of the two processes when one is killed."""
    greedy = ask(next(name), max_tokens=20)
    drawn = ask(next(name), max_tokens=20, temperature=1.0, seed=4, repetition_penalty=1.2)
    requests = greedy, drawn.model_copy(update={"logprobs": 2})
    with Program(VLLM.command) as pair:
        pair.load(load_command(twin, tensor_parallel_size=2))
        found = [[result.tokens for result in program.generate(*requests)] for program in (alone, pair)]
        assert found[0] == found[1]
        for program, grammar in ((alone, True), (pair, False)):
            assert all(len(program.results[request.id].logprobs) in (0, 20) for request in requests)
            assert program.capabilities is not None
            assert program.capabilities.grammar == grammar
            assert listening(program) <= {"127.0.0.1"}
        regex = Grammar(syntax="regex", source="a+")
        (refused,) = pair.generate(greedy.model_copy(update={"id": next(name), "grammar": regex}))
        assert (refused.failed.code, refused.failed.param) == ("invalid_request", "grammar")
        stream = ask(next(name), max_tokens=2000)
        pair.send(stream)
        pair.until(lambda: stream.id in pair.results and bool(pair.results[stream.id].tokens))
        children = psutil.Process(pair.process.pid).children(recursive=True)
        assert children
        pair.process.kill()
        assert pair.drain() == -signal.SIGKILL
        assert psutil.wait_procs(children, timeout=60)[1] == []


def listening(program: Program) -> set[str]:
    """The addresses at which a runner's processes wait for connections."""
    runner = psutil.Process(program.process.pid)
    connections = [each for process in (runner, *runner.children(recursive=True)) for each in process.net_connections()]
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}


def test_a_computation_that_goes_wrong_fails_its_own_request_only(twin: Path) -> None:
    """One token's embedding is no number, so whoever has it in the prompt gets no answer."""
    weights: dict[str, npt.NDArray[np.float32]] = load_file(twin / "model.safetensors")
    weights["model.embed_tokens.weight"][120] = np.nan
    save_file(weights, twin / "model.safetensors")
    with Program(VLLM.command) as program:
        program.load(load_command(twin))
        never = {120: -1000.0}
        good, bad = ask(next(name), [97] * 40, max_tokens=100, logit_bias=never), ask(next(name), [97, 120, *[98] * 40])
        results = program.generate(good, bad, bad.model_copy(update={"id": next(name), "logprobs": 2}))
        again = program.generate(*(each.model_copy(update={"id": next(name)}) for each in (good, bad)))
        assert results[0].tokens == again[0].tokens
        assert results[0].finished.reason == "length"
        for result in (*results[1:], again[1]):
            assert (result.failed.code, result.tokens) == ("engine_error", [])


@pytest.mark.skipif(
    "amx_int8" in Path("/proc/cpuinfo").read_text(),
    reason="on a CPU with AMX, vLLM's kernel for eight bits takes no float32, and crashes with so small a model",
)
def test_a_folder_that_is_quantised_is_computed_as_it_says(twin: Path) -> None:
    """Eight bits a weight and eight an activation, as vLLM's own tools write it: nearly what the whole numbers give."""
    prompt = [97 + at % 23 for at in range(40)]
    asked = ask(next(name), prompt, max_tokens=1).model_copy(update={"prompt_logprobs": 0})
    with Program(RUNNERS["mlx"].command) as program:
        program.load(Load(model_id="t", backend="MlxCpu", table={"path": str(twin), "dtype": "float32"}))
        whole = told(program.generate(asked)[0])
    quantise(twin)
    with Program(VLLM.command) as program:
        capabilities = program.load(load_command(twin))
        apart = np.abs(told(program.generate(asked)[0]) - whole)
    assert 1e-3 < apart.max() < 0.5
    assert apart.mean() < 0.1
    assert capabilities.model_bytes == (twin / "model.safetensors").stat().st_size - header_bytes(twin)


def told(result: Result) -> npt.NDArray[np.float64]:
    (prompt,) = result.prompt_logprobs
    return np.array([each.chosen.logprob for each in prompt.items[1:]])


def header_bytes(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def quantise(folder: Path) -> None:
    """Every matrix of the layers to whole numbers, a scale for each of its rows."""
    weights: dict[str, npt.NDArray[np.float32]] = load_file(folder / "model.safetensors")
    stored: dict[str, npt.NDArray[np.generic]] = {}
    for key, matrix in weights.items():
        if key.endswith("_proj.weight"):
            scale = np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-9) / 127
            rounded: npt.NDArray[np.float32] = np.rint(matrix / scale)
            stored[key] = rounded.astype(np.int8)
            stored[f"{key}_scale"] = scale
        else:
            stored[key] = matrix
    save_file(stored, folder / "model.safetensors")
    whole: dict[str, JsonValue] = {"num_bits": 8, "type": "int", "symmetric": True}
    group: JsonValue = {
        "targets": ["Linear"],
        "weights": {**whole, "strategy": "channel", "dynamic": False},
        "input_activations": {**whole, "strategy": "token", "dynamic": True},
    }
    method = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    edit_config(folder, quantization_config={**method, "ignore": ["lm_head"], "config_groups": {"group_0": group}})


def edit_config(folder: Path, **changes: JsonValue) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_a_build_cannot_do_is_refused_with_the_reason(twin: Path) -> None:
    def refusal(processors: bool, config: dict[str, JsonValue] | None = None, **table: JsonValue) -> str:
        with pytest.raises(LoadError) as refused:
            check_limits(read_options(table), config or {}, processors=processors, devices=1)
        assert refused.value.code == "model_misconfigured"
        return str(refused.value).removeprefix("model card, [vllm] ")

    pipelines = "vLLM's CPU build cannot compute pipelines; use tensor_parallel_size to divide a model there"
    assert refusal(True, pipeline_parallel_size=2) == f"pipeline_parallel_size = 2: {pipelines}"
    assert refusal(False, tensor_parallel_size=2, pipeline_parallel_size=3) == (
        "tensor_parallel_size 2 times pipeline_parallel_size 3 takes 6 GPUs, but there are 1 here"
    )
    methods = "vLLM's CPU build supports only awq, auto_awq, gptq, auto_gptq, compressed-tensors"
    assert refusal(True, quantization="fp8") == f"quantization = 'fp8': {methods}"
    folders: dict[str, JsonValue] = {"quantization_config": {"quant_method": "mxfp4"}}
    assert refusal(True, folders) == f"the folder's quantisation = 'mxfp4': {methods}"
    check_limits(read_options({"quantization": "fp8"}), folders, processors=False, devices=1)
    check_limits(read_options({"tensor_parallel_size": 2}), {}, processors=True, devices=0)
    with Program([*VLLM.command[:1], "-c", WITHOUT_VLLM]) as program:
        program.send(Estimate(load=load_command(twin, pipeline_parallel_size=2)))
        assert program.drain() != 0
        assert program.failure is not None
        assert "cannot compute pipelines" in program.failure.message


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"max_model_len": 10}, "max_model_len"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size = 2: vLLM's CPU build cannot compute pipelines"),
        ({"quantization": "fp8"}, "quantization = 'fp8'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"dtype": "float8"}, "dtype"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"repo": "a/b"}, "path or repo"),
    ],
)
def test_a_wrong_setting_is_named_before_vllm_is_imported(twin: Path, table: dict[str, JsonValue], named: str) -> None:
    with Program([*VLLM.command[:1], "-c", WITHOUT_VLLM]) as program:
        program.send(load_command(twin, **table))
        assert program.drain() != 0
        assert program.failure is not None
        assert program.failure.code == "model_misconfigured"
        assert named in program.failure.message


WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
from exo.worker.runner_vllm.__main__ import main
sys.argv[1:] = []
main()
"""


# --- the server ---


def serving(home: Path, backends: list[JsonValue]) -> None:
    """One model for the engines that serve ``backends``, with the same weights."""
    write_gguf(home / "tiny.gguf", TWIN)
    write_mlx(home / "tiny", TWIN)
    tables: dict[str, dict[str, JsonValue]] = {
        "cuda": {"path": str(home / "tiny.gguf"), "n_ctx": 2048, **FLOAT32},
        "vllm": {"path": str(home / "tiny"), "max_model_len": 2048, "dtype": "float32", "threads": 1},
    }
    write_card(home, "tiny", tables, backends=backends)


def kill_runner(server: ServeProgram, then: Callable[[], object] = lambda: None) -> Callable[[], None]:
    def kill() -> None:
        then()
        (runner,) = server.runners()
        os.kill(runner.pid, signal.SIGKILL)

    return kill


def test_a_stream_survives_its_runner_and_then_its_engine(tmp_path: Path) -> None:
    """The second death finds an environment that is broken by then, so the other engine goes on."""
    gone = tmp_path / "gone"
    script(
        tmp_path / ".venv-vllm" / "bin" / "python",
        f'case "$*" in *--probe*) ;; *) [ -e {gone} ] && exit 3 ;; esac',
        f'exec {VLLM.interpreter} "$@"',
    )
    serving(tmp_path, ["Vllm", "LlamaCppCpu"])
    with ServeProgram(tmp_path, python=without_vllm(tmp_path)) as server:
        undisturbed = whole(server)
        (runner,) = server.runners()
        assert any("runner_vllm" in part for part in runner.cmdline())
        assert texts_of(streamed(server, "/v1/completions", BODY, 1, kill_runner(server))) == undisturbed
        (runner,) = server.runners()
        assert any("runner_vllm" in part for part in runner.cmdline())
        assert texts_of(streamed(server, "/v1/completions", BODY, 1, kill_runner(server, gone.touch))) == undisturbed
        assert server.complete("tiny", max_tokens=1).headers["x-exo-runner"] == "cuda"


def test_without_the_environment_other_engines_serve_and_the_reason_is_told(tmp_path: Path) -> None:
    serving(tmp_path, ["Vllm", "LlamaCppCpu"])
    with ServeProgram(tmp_path, python=without_vllm(tmp_path)) as server:
        reply = server.complete("tiny", max_tokens=4)
        assert (reply.status_code, reply.headers["x-exo-runner"]) == (200, "cuda")
        assert "Vllm" in reply.headers["x-exo-route"]
        refused = server.complete("tiny@vllm", max_tokens=4)
        assert refused.status_code == 400
        assert "exo setup vllm" in refused.json()["error"]["message"]
