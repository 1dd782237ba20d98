"""A model that vLLM divides among two hosts, which are network namespaces joined by a cable."""

import sys
from pathlib import Path

import psutil
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Load, Peer
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_vllm.limits import check_limits, divided
from exo.worker.runner_vllm.options import read_options
from tests.conftest import needs_vllm
from tests.support.peers import CABLE, cable, needs_namespaces, parts
from tests.support.program import DEADLINE_SECONDS, Program, ask, names
from tests.support.tiny import Shape, write_mlx

VLLM = RUNNERS["vllm"]

pytestmark = needs_vllm

name = names()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_mlx(folder, Shape(head_dim=64))
    return folder


def load(model: Path, *hosts: Peer, **table: JsonValue) -> Load:
    settings: dict[str, JsonValue] = {"path": str(model), "dtype": "float32", "threads": 1, "max_model_len": 512}
    return Load(model_id="test/tiny", backend="Vllm", table={**settings, **table}, peers=hosts)


@needs_namespaces
def test_two_hosts_choose_what_one_does_and_end_together(model: Path) -> None:
    requests = ask(next(name), max_tokens=20), ask(next(name), max_tokens=20, temperature=1.0, seed=4)
    with Program(VLLM.command) as program:
        program.load(load(model))
        expected = [each.tokens for each in program.generate(*requests)]
    with cable() as hosts:
        guard = (sys.executable, "-m", "exo.worker.guard", VLLM.module)
        far = Peer(name="far", command=(*hosts.prefix(hosts.there), *guard), address=CABLE[1])
        with Program((*hosts.prefix(hosts.here), *VLLM.command)) as program:
            found = program.load(load(model, far))
            assert found.devices == ("CPU", "far/CPU")
            assert not found.grammar
            assert [each.tokens for each in program.generate(*requests)] == expected
            stream = ask(next(name), max_tokens=400)
            program.send(stream)
            program.until(lambda: stream.id in program.results and bool(program.results[stream.id].tokens))
            (follower,) = parts(program.process.pid, "--follow")
            workers = [each for each in psutil.process_iter() if on_host(each, follower)]
            assert follower in workers
            hosts.cut()
            program.process.kill()
            assert psutil.wait_procs(workers, timeout=DEADLINE_SECONDS)[1] == []


def on_host(process: psutil.Process, other: psutil.Process) -> bool:
    """Whether two processes are in the same network namespace."""
    try:
        return Path(f"/proc/{process.pid}/ns/net").readlink() == Path(f"/proc/{other.pid}/ns/net").readlink()
    except OSError:
        return False


def test_a_host_without_the_model_is_named(model: Path, tmp_path: Path) -> None:
    far = Peer(name="far", command=VLLM.command, address="127.0.0.1", directories=(str(tmp_path / "nothing"),))
    command = load(model, far, path="tiny").model_copy(update={"directories": (str(model.parent),)})
    with Program(VLLM.command) as program:
        program.send(command)
        assert program.drain() != 0
        assert program.failure is not None
        assert "host far could not load its share: no model folder" in program.failure.message


def test_estimates_say_what_each_host_takes(model: Path) -> None:
    with Program(VLLM.command) as program:
        program.send(Estimate(load=load(model, Peer(name="far", command=(), address="127.0.0.1"))))
        program.until(lambda: program.estimated is not None)
        assert program.estimated is not None
        option = program.estimated.choices[-1]
        assert 0 < option.devices["far/memory"] < option.host


def test_a_card_that_does_not_suit_the_hosts_is_refused_with_the_key() -> None:
    """A GPU build divides by layers, the CPU build every layer."""
    options = read_options({})
    assert divided(options, 2, processors=False).pipeline_parallel_size == 2
    assert divided(options, 2, processors=True).tensor_parallel_size == 2
    with pytest.raises(LoadError, match="tensor_parallel_size times pipeline_parallel_size is 3, for 2 hosts"):
        divided(read_options({"tensor_parallel_size": 3}), 2, processors=False)
    with pytest.raises(LoadError, match="cannot compute pipelines"):
        check_limits(read_options({"pipeline_parallel_size": 2}), {}, processors=True, devices=0)
