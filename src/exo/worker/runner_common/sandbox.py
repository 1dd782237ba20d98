"""A sandbox for untrusted input: a process with limits that answers one line of JSON for each line it gets.

Chat templates, grammars and model files come from strangers and can take unlimited time or memory, and a thread cannot
be stopped. A process can. A sandbox program is a module that calls ``serve`` when it is run. A runner drives it with
``Sandbox``, which blocks; the server drives several at a time with ``exo.chat.sandbox_pool``. A program

1. gets none of its owner's environment and does not share the terminal's signals;
2. reads its setup from the first line and answers ``{}`` when it is ready, because starting on a busy machine is slow
   and must not count as slow work;
3. then has ``cpu_seconds`` of computing and ``seconds`` of time for each answer, may map ``address_space`` bytes of
   memory, and writes no file. The work is limited by computing, because everything takes longer on a busy machine.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

START_SECONDS = 30.0
"""The time a program has until it is ready."""
ENDED = "ended the process that works on it"
"""The error of a process that ended by itself or by one of its limits."""
Answer = Mapping[str, str]


class SandboxError(Exception):
    """The sandbox gave no answer. The message continues a sentence whose subject is the work."""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Limits of a sandbox. ``cpu_seconds``, ``seconds`` of wall time and ``answer_bytes`` are for one answer."""

    seconds: float
    address_space: int
    answer_bytes: int = 1 << 20
    cpu_seconds: float | None = None

    def error(self, exit_code: int | None) -> SandboxError:
        """The error of a program that has ended instead of answering."""
        return SandboxError(f"took longer than {self.cpu_seconds:g} s" if exit_code == -signal.SIGPROF else ENDED)


def command(module: str) -> list[str]:
    """The command line of a sandbox program."""
    return [sys.executable, "-P", "-m", module]


def environment() -> dict[str, str]:
    """The environment of a sandbox program: only what it needs to find its modules.

    They are beside this one, also where the process has another package ``exo``.
    """
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}


def line(content: Mapping[str, object]) -> bytes:
    """One line of the protocol."""
    return json.dumps(content).encode() + b"\n"


@final
class Sandbox:
    """A sandbox program driven by one thread. It is started at once, and started again after a failure."""

    def __init__(self, module: str, limits: SandboxLimits, setup: Mapping[str, object] | None = None) -> None:
        self._module = module
        self._limits = limits
        self._setup = line(setup or {})
        self._process = self._start()
        self._ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Mapping[str, object]) -> dict[str, str]:
        """The answer to one request. Raises SandboxError, after which the next request gets a new process."""
        if self._process.poll() is not None:
            self.close()
            self._process, self._ready = self._start(), False
        try:
            if not self._ready:
                self._read(START_SECONDS)
                self._ready = True
            assert self._process.stdin is not None
            self._process.stdin.write(line(request))
            return self._read(self._limits.seconds)
        except BrokenPipeError:
            self.close()
            raise self._limits.error(self._process.returncode) from None
        except BaseException:
            self.close()  # the next request must not get this one's answer
            raise

    def close(self) -> None:
        """Ends the program, which has nothing to lose."""
        self._process.kill()
        with self._process:
            pass

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command(self._module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment(),
            start_new_session=True,
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # the first request reports it
            process.stdin.write(self._setup)
        return process

    def _read(self, seconds: float) -> dict[str, str]:
        assert self._process.stdout is not None
        output, answer, deadline = self._process.stdout.fileno(), bytearray(), time.monotonic() + seconds
        readable = select.poll()  # unlike select.select, it takes descriptors of any number
        readable.register(output, select.POLLIN)
        while not answer.endswith(b"\n"):
            if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise SandboxError(f"took longer than {seconds:g} s")
            if not (piece := os.read(output, 1 << 16)):
                raise self._limits.error(self._process.wait())
            answer += piece
            if len(answer) > self._limits.answer_bytes:
                raise SandboxError(f"gave an answer of more than {self._limits.answer_bytes} bytes")
        return json.loads(answer)


def serve(prepare: Callable[[bytes], Callable[[bytes], Answer]], limits: SandboxLimits) -> None:
    """Runs a sandbox program until standard input closes. ``prepare`` gets the setup line and returns what answers."""
    for limit, value in (
        (resource.RLIMIT_AS, limits.address_space),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # not every system can limit address space; the deadline still holds
            resource.setrlimit(limit, (value, value))
    answer = prepare(sys.stdin.buffer.readline())
    _send({})
    for request in sys.stdin.buffer:
        # Unhandled, SIGALRM and SIGPROF end the process even inside one endless C call, and even if its owner is gone.
        # The owner's own deadline comes before SIGALRM, so that its error names the time.
        signal.setitimer(signal.ITIMER_REAL, limits.seconds + 1)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds or 0)
        reply = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(reply)


def _send(reply: Answer) -> None:
    sys.stdout.buffer.write(line(reply))
    sys.stdout.buffer.flush()
