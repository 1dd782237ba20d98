"""Devices that llama.cpp takes for GPUs: RPC servers on this machine, each with a stated amount of memory.

``python -m tests.support.rpc_devices BYTES[,BYTES...] COMMAND...`` starts devices and replaces itself with a runner,
which alone has them. They are named RPC0, RPC1 and so on, and serve the backend LlamaCppCuda.
"""

import hashlib
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import llama_cpp
import pytest

from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_cuda.plugin import RPC_LIBRARY
from tests import ROOT
from tests.support.program import DEADLINE_SECONDS, runner_command

_VARIABLE = "EXO_TEST_RPC_SERVERS"
_SOURCE = Path(__file__).with_name("rpc_device.c")
_LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
_RUNNER = tuple(runner_command(RUNNERS["cuda"].module))


class RpcDevice:
    """The process of one device. It may claim to have more ``memory`` than it has."""

    def __init__(self, memory: int, claims: int | None = None) -> None:
        command = (_program(), str(memory), str(memory if claims is None else claims))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe)
        self.address = f"127.0.0.1:{self._number()}"

    def _number(self) -> int:
        assert self.process.stderr is not None
        return int(self.process.stderr.readline())

    def used(self) -> int:
        """The bytes that all clients have allocated."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"?")
        self.process.stdin.flush()
        return self._number()

    def wait_until_empty(self) -> None:
        """Waits for the device to notice that clients have ended."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.used():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def variables(devices: Sequence[RpcDevice]) -> dict[str, str]:
    """The environment of a program that has these devices."""
    return {_VARIABLE: ",".join(each.address for each in devices)}


@contextmanager
def rpc_devices(*memory: int, claims: int | None = None) -> Generator[list[RpcDevice]]:
    """Devices of so many bytes each, or which claim so. Programs that start meanwhile have them, and share them."""
    devices = [RpcDevice(each, claims) for each in memory]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(*next(iter(variables(devices).items())))
            yield devices
    finally:
        for each in devices:
            each.process.communicate()


def llama_command(backend: str, *memory: int) -> tuple[str, ...]:
    """The command of a llama.cpp runner. For LlamaCppCuda it has devices of so many bytes for itself, or two."""
    if backend != "LlamaCppCuda":
        return _RUNNER
    sizes = ",".join(map(str, memory or (2 << 30, 1 << 30)))
    return (sys.executable, "-m", "tests.support.rpc_devices", sizes, *_RUNNER)


@cache
def _program() -> Path:
    """Compiles the device, unless that was done before."""
    assert (_LIBRARIES / RPC_LIBRARY).exists(), "make llama builds it"
    libraries = [_LIBRARIES / each for each in (RPC_LIBRARY, "libggml-cpu.so.0", "libggml-base.so.0")]
    command = ["gcc", f"-I{sysconfig.get_path('purelib')}/include", _SOURCE, *libraries, f"-Wl,-rpath,{_LIBRARIES}"]
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    program = ROOT / "build" / f"rpc_device-{key}"
    if not program.exists():
        program.parent.mkdir(exist_ok=True)
        new = program.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", new], check=True)
        new.rename(program)
    return program


def _main(memory: str, *command: str) -> None:
    devices = [RpcDevice(int(each)) for each in memory.split(",")]
    os.environ.update(variables(devices))
    for each in devices:  # the runner holds their standard inputs until it ends
        assert each.process.stdin is not None
        os.set_inheritable(each.process.stdin.fileno(), True)
    os.execv(command[0], command)


if __name__ == "__main__":
    _main(*sys.argv[1:])
