"""Sandbox programs driven from the server's event loop. See ``exo.worker.runner_common.sandbox`` for their limits."""

import json
from collections.abc import Mapping

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from exo.start_process import start_process
from exo.worker.runner_common.sandbox import (
    START_SECONDS,
    SandboxError,
    SandboxLimits,
    command,
    environment,
    line,
)

PROCESSES = 4
"""The number of slow requests that do not delay other requests."""
TURN_SECONDS = 10.0
"""The longest wait for a free process."""


class SandboxBusyError(Exception):
    """The work was not begun, because other work held all processes for too long. It may be tried again."""


class SandboxProcess:
    """One sandbox program, started when first needed and again after a failure. Requests take turns."""

    def __init__(self, module: str, limits: SandboxLimits) -> None:
        self._module = module
        self._limits = limits
        self._turn = anyio.Lock()
        self._process: Process | None = None
        self._answers: BufferedByteReceiveStream | None = None

    async def ask(self, request: Mapping[str, object]) -> dict[str, str]:
        """The answer to one request. Raises SandboxError, and SandboxBusyError if the program cannot be started now."""
        content = line(request)
        async with self._turn:
            seconds = START_SECONDS
            try:
                if self._process is None:
                    with anyio.fail_after(seconds):
                        self._process = await self._start()
                        await self._exchange(self._process, line({}))
                seconds = self._limits.seconds
                with anyio.fail_after(seconds):
                    return await self._exchange(self._process, content)
            except TimeoutError:
                await self.aclose()
                raise SandboxError(f"took longer than {seconds:g} s") from None
            except anyio.DelimiterNotFound:
                await self.aclose()
                raise SandboxError(f"gave an answer of more than {self._limits.answer_bytes} bytes") from None
            except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
                process = self._process
                await self.aclose()
                raise self._limits.error(process.returncode if process is not None else None) from None
            except BaseException:
                await self.aclose()  # the next request must not get this one's answer
                raise

    async def aclose(self) -> None:
        """Ends the process, which has nothing to lose."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.aclose()

    async def _start(self) -> Process:
        try:
            process = await start_process(command(self._module), stderr=None, env=environment(), start_new_session=True)
        except OSError as error:
            raise SandboxBusyError(
                "no process could be started to work on it; see the limits on open files and processes"
            ) from error
        assert process.stdout is not None
        self._answers = BufferedByteReceiveStream(process.stdout)
        return process

    async def _exchange(self, process: Process, request: bytes) -> dict[str, str]:
        assert process.stdin is not None
        assert self._answers is not None
        await process.stdin.send(request)
        return json.loads(await self._answers.receive_until(b"\n", self._limits.answer_bytes))


class SandboxPool:
    """A few processes of one sandbox program. Each is started when all others are busy."""

    def __init__(self, module: str, limits: SandboxLimits) -> None:
        self._processes = [SandboxProcess(module, limits) for _ in range(PROCESSES)]
        self._idle = list(self._processes)
        # The pool takes the process that worked last first: its cache holds the templates that clients use most.
        self._turns = anyio.Semaphore(PROCESSES)

    async def ask(self, request: Mapping[str, object]) -> dict[str, str]:
        """The answer to one request. Raises SandboxError and SandboxBusyError."""
        try:
            with anyio.fail_after(TURN_SECONDS):
                await self._turns.acquire()
        except TimeoutError:
            raise SandboxBusyError(f"no process was free to work on it within {TURN_SECONDS:g} s") from None
        process = self._idle.pop()
        try:
            return await process.ask(request)
        finally:
            self._idle.append(process)
            self._turns.release()

    async def aclose(self) -> None:
        """Ends the processes, which have nothing to lose."""
        for process in self._processes:
            await process.aclose()
