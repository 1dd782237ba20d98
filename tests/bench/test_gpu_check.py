"""What of ``scripts/gpu_check`` holds without a GPU: calls, the plug-in, steps, verdicts, models, the report."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from bench.gpu_check import report
from bench.gpu_check.checks import counted, verdict
from bench.gpu_check.models import SMALL_MODELS, CheckedModel, write_random
from bench.gpu_check.options import ROOT, parse
from bench.gpu_check.prepare import cuda_libraries
from bench.gpu_check.record import CheckError, CheckStep, Record, find, perform
from exo.bench.options import BenchOptions
from exo.bench.report import Distribution, LoadResult, Report, Requests, Stage, Tokens
from exo.worker.protocol.commands import Load
from exo.worker.runner_cuda.plugin import DESCRIPTION, LIBRARY, Plugin
from tests.support.nvidia_driver import CRASHES, StandIn, compiled, install_driver, needs_gcc
from tests.support.program import Program, ask, runner_command

# --- calls ---


def gpu_check(work: Path, *arguments: str, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts" / "gpu_check", "--work", work, *arguments]
    return subprocess.run(command, env={**env, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)


def test_an_unknown_stage_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "--stages", "parity,paint")
    assert done.returncode == 2
    assert "some of self-test,contract,parity,offload,devices,sweep,sampling,agent (got 'paint')" in done.stderr


def test_a_missing_archive_is_named_with_what_makes_it(tmp_path: Path) -> None:
    done = gpu_check(tmp_path / "work", "--cpu", "--archive", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "make gpu-archive" in done.stderr


def test_the_checkout_stays_as_it_is() -> None:
    done = gpu_check(ROOT / "build" / "work")
    assert done.returncode == 2
    assert "must be outside the checkout" in done.stderr


# --- the plug-in ---


def archive_with_plugin(folder: Path) -> Path:
    """An archive with a plug-in for compute capability 9.0 that was compiled with CUDA 13.2."""
    folder.mkdir()
    compiled(folder, LIBRARY, CRASHES)
    Plugin("built", "0.3.36", (13, 2), ("90",), (), ("/somewhere/else",)).write(folder)
    with tarfile.open(folder / "archive.tar.xz", "w:xz") as archive:
        for name in (LIBRARY, DESCRIPTION):
            archive.add(folder / name, f"plugin/{name}")
    return folder / "archive.tar.xz"


@needs_gcc
@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (None, "there is no NVIDIA driver with a GPU here; --cpu --small tries the script without one"),
        (StandIn(status=18, error="Driver/library version mismatch"), "reboot after an update of the driver"),
        (StandIn("570.1", 12080, (9, 0)), "driver 570.1 supports CUDA 12.8, and CUDA 13 needs driver 580 or newer"),
        (StandIn(), "no machine code for compute capability 8.9; make gpu-archive ARGS='--archs 89-real'"),
    ],
)
def test_a_machine_that_cannot_run_the_plug_in_is_told_before_anything_is_installed(
    tmp_path: Path, driver: StandIn | None, said: str
) -> None:
    archive = archive_with_plugin(tmp_path / "archive")
    done = gpu_check(tmp_path / "work", "--archive", str(archive), env=install_driver(tmp_path / "driver", driver))
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "work" / "venv").exists()


def test_cudas_libraries_are_found_among_the_packages_of_a_python_in_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    for name in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"):
        (folder / name).touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cuda_libraries(13) == (str(folder),)
    with pytest.raises(CheckError, match=r"there is no libcudart\.so\.99: not in the Python packages"):
        cuda_libraries(99)


# --- steps ---


def failing(_: float) -> dict[str, int]:
    raise CheckError("it broke", {"seen": 1})


def surprising(_: float) -> dict[str, int]:
    raise ZeroDivisionError("by zero")


def test_a_step_that_passed_is_not_run_again_and_one_that_failed_is(tmp_path: Path) -> None:
    deadline = time.monotonic() + 60
    assert perform(CheckStep("a", "parity", failing), tmp_path, deadline).facts == {"seen": 1}
    assert perform(CheckStep("a", "parity", lambda _: {"seen": 2}), tmp_path, deadline).state == "passed"
    assert perform(CheckStep("a", "parity", failing), tmp_path, deadline).facts == {"seen": 2}
    kept = find(tmp_path, "a")
    assert kept is not None
    assert (kept.state, kept.message, kept.facts) == ("passed", "", {"seen": 2})


def test_what_nobody_expected_is_a_failure_of_its_step(tmp_path: Path) -> None:
    record = perform(CheckStep("b", "parity", surprising), tmp_path, time.monotonic() + 60)
    assert (record.state, record.message) == ("failed", "ZeroDivisionError: by zero")


def test_a_step_is_not_begun_with_too_little_time(tmp_path: Path) -> None:
    record = perform(CheckStep("c", "sweep", failing, least_seconds=30), tmp_path, time.monotonic() + 20)
    assert record.state == "not run"


@pytest.mark.parametrize("said", ["", "no tests ran in 0.01s", "3 failed, 2 deselected in 1s"])
def test_no_contract_test_is_no_pass(said: str) -> None:
    with pytest.raises(CheckError, match="no test"):
        counted(said)


def test_contract_tests_are_counted() -> None:
    assert counted("....\n53 passed, 104 deselected in 40.08s") == {"passed": 53, "deselected": 104}


# --- offload ---


def loads(every: int, half: int, nothing: int) -> dict[str, dict[str, object]]:
    return {
        name: {"devices": devices, "model_bytes": 100, "taken_bytes": taken, "tokens": 16}
        for name, devices, taken in (("all", ["CUDA0"], every), ("half", ["CUDA0"], half), ("none", ["CPU"], nothing))
    }


def test_offload_is_believed_where_the_gpus_memory_shows_it(tmp_path: Path) -> None:
    options = parse(["--work", str(tmp_path)])
    assert verdict(loads(95, 48, 1), options) == ""


@pytest.mark.parametrize(
    ("every", "half", "nothing", "said"),
    [
        (10, 5, 1, "all layers took 10 bytes"),
        (95, 95, 1, "half of the layers took 95"),
        (95, 2, 1, "half of the layers took 2"),
        (95, 48, 60, "no layer was to be on the GPU, but 60"),
    ],
)
def test_offload_that_did_not_happen_is_found(every: int, half: int, nothing: int, said: str, tmp_path: Path) -> None:
    assert said in verdict(loads(every, half, nothing), parse(["--work", str(tmp_path)]))


def test_a_runner_that_names_no_gpu_is_found(tmp_path: Path) -> None:
    found = loads(95, 48, 1)
    found["all"]["devices"] = ["CPU"]
    assert "the runner names ['CPU']" in verdict(found, parse(["--work", str(tmp_path)]))


# --- models ---


@pytest.mark.parametrize("model", SMALL_MODELS, ids=lambda model: model.name)
def test_a_model_of_random_blocks_loads_and_its_logits_are_finite_and_unlike(
    model: CheckedModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_random(path, model.shape)
    table = {"path": str(path), "threads": 1, "n_ctx": 256, "slots": 1}
    with Program(runner_command("exo.worker.runner_cuda")) as runner:
        capabilities = runner.load(Load(model_id="test/random", backend="LlamaCppCpu", table=table))
        request = ask("a", temperature=1.0, max_tokens=12).model_copy(update={"logprobs": 8})
        (result,) = runner.generate(request)
    assert capabilities.vocabulary == model.shape.vocabulary
    assert len(result.tokens) == 12
    found = [each.logprob for token in result.logprobs for each in (token.chosen, *token.top)]
    finite = [logprob for logprob in found if logprob is not None and math.isfinite(logprob)]
    assert len(finite) == len(found) == 12 * 9
    assert max(finite[1:9]) - min(finite[1:9]) > 0.1


# --- the report ---


def stage(streams: int, rate: float) -> Stage:
    times = Distribution(count=8, mean=12, min=12, p50=12, p90=12, p95=12, p99=12, max=12)
    return Stage(
        load=LoadResult(concurrency=streams, rate=None),
        requests=Requests(sent=8, whole=8, cut=0, errors={}, messages={}),
        tokens=Tokens(prompt=8, cached=0, output=8, counted_by_usage=8, checked_by_ids=0),
        seconds=1,
        output_tokens_per_second=rate,
        total_tokens_per_second=rate,
        requests_per_second=1,
        goodput=None,
        ttft=times,
        itl=None,
        tpot=None,
        e2e=None,
        long_prompt=None,
    )


def record(program: str, *rates: float) -> Record:
    asked = BenchOptions(url="http://127.0.0.1:1", model="m", concurrency=(1, 2))
    stages = tuple(stage(streams, rate) for streams, rate in zip((1, 2), rates, strict=True))
    found = Report(date="2026", exo_version="0", client="c", options=asked, stages=stages)
    facts = {"report": found.model_dump(mode="json")}
    return Record(f"sweep small-q4_0 {program}", "sweep", "passed", 9, facts=facts)


def recorded() -> dict[str, Record]:
    batch = {"streams": 2, "prompt_tokens": 32, "output_tokens": 16, "prefill_seconds": 0.1, "decode_seconds": 0.3}
    proof = {"device": "CUDA0", "difference": 0.001}
    records = [
        Record("self-test", "self-test", "passed", 1, facts={"proofs": [proof]}),
        Record("contract", "contract", "failed", 2, "pytest ended with 1"),
        record("exo", 100, 200),
        record("llama-server", 80, 250),
        Record("sweep small-q4_0 llama-batched-bench", "sweep", "passed", 3, facts={"batches": [batch]}),
    ]
    return {record.step: record for record in records}


def test_the_table_has_every_load_beside_its_peer_and_its_ceiling(tmp_path: Path) -> None:
    options = parse(["--work", str(tmp_path), "--small"])
    assert list(report.rows(options, recorded())) == [
        ("sweep small-q4_0", "1", "100.0 (12)", "80.0 (12)", "1.25", "-"),
        ("sweep small-q4_0", "2", "200.0 (12)", "250.0 (12)", "0.80", "80.0"),
    ]
    shown = Console(width=200, record=True, file=io.StringIO())
    report.show(options, recorded(), shown)
    text = shown.export_text()
    assert "CUDA0: 1.0e-03 nats" in text
    assert "pytest ended with 1" in text
    assert "100.0 (12)" in text


def test_the_json_file_names_the_machine_and_holds_every_step(tmp_path: Path) -> None:
    options = parse(["--work", str(tmp_path), "--small", "--out", str(tmp_path / "out")])
    report.write(options, report.machine(), recorded())
    written = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert written["host"]["cpu_count"] == os.cpu_count()
    assert written["backend"] == "LlamaCppCuda"
    assert [step["state"] for step in written["steps"]] == ["passed", "failed", *["passed"] * 3]
    assert written["steps"][2]["facts"] == recorded()["sweep small-q4_0 exo"].facts
