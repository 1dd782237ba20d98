"""Processes for work on input that may be hostile: ended when they are late, replaced when they die."""

import json
import os
import sys
from collections.abc import Mapping

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream


class LimitedError(Exception):
    """No answer came: the process was late or ended. The message goes on from the name of the work."""


class LimitedBusyError(Exception):
    """The work was not begun: other work took all processes for too long. It may be tried again."""


PROCESSES = 4
"""How much slow work does not hold up the rest."""
TURN_SECONDS = 10.0
"""How long work waits until a process is free."""
START_SECONDS = 30.0
"""For the process to come up, which on a busy machine is slow and nobody's fault."""


class LimitedProcess:
    """``python -m module``: its first line says that it is up, then it answers one JSON object a line with one.

    It is started when first needed.

    It gets none of the server's environment and does not share the terminal's signals. Requests take turns.
    """

    def __init__(self, module: str, *, seconds: float, answer_limit: int) -> None:
        """``seconds`` of wall time and ``answer_limit`` bytes are what one answer may take."""
        self._module = module
        self._seconds = seconds
        self._answer_limit = answer_limit
        self._turn = anyio.Lock()
        self._process: Process | None = None
        self._answers: BufferedByteReceiveStream | None = None

    async def ask(self, request: Mapping[str, object]) -> dict[str, str]:
        """The answer. Raises ``LimitedError``."""
        line = json.dumps(request).encode() + b"\n"
        async with self._turn:
            seconds = START_SECONDS
            try:
                if self._process is None:
                    with anyio.fail_after(seconds):
                        self._process = await self._start()
                        await self._read()
                seconds = self._seconds
                with anyio.fail_after(seconds):
                    assert self._process.stdin is not None
                    await self._process.stdin.send(line)
                    return await self._read()
            except TimeoutError:
                await self.aclose()
                raise LimitedError(f"took longer than {seconds:g} s") from None
            except anyio.DelimiterNotFound:
                await self.aclose()
                raise LimitedError(f"gave an answer of more than {self._answer_limit} bytes") from None
            except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
                await self.aclose()
                raise LimitedError("ended the process that works on it") from None
            except BaseException:
                await self.aclose()  # an answer nobody waits for would be taken for the next one's
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
        process = await anyio.open_process(
            [sys.executable, "-P", "-m", self._module],
            stderr=None,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        assert process.stdout is not None
        self._answers = BufferedByteReceiveStream(process.stdout)
        return process

    async def _read(self) -> dict[str, str]:
        assert self._answers is not None
        return json.loads(await self._answers.receive_until(b"\n", self._answer_limit))


class LimitedProcesses:
    """A few processes like ``LimitedProcess``, of which each is started when the others are at work."""

    def __init__(self, module: str, *, seconds: float, answer_limit: int) -> None:
        """As of ``LimitedProcess``."""
        self._processes = [LimitedProcess(module, seconds=seconds, answer_limit=answer_limit) for _ in range(PROCESSES)]
        self._idle = list(self._processes)
        """The one that worked last is at the end. It is taken first, since it has compiled what is asked for most."""
        self._turns = anyio.Semaphore(PROCESSES)

    async def ask(self, request: Mapping[str, object]) -> dict[str, str]:
        """The answer. Raises ``LimitedError`` and ``LimitedBusyError``."""
        try:
            with anyio.fail_after(TURN_SECONDS):
                await self._turns.acquire()
        except TimeoutError:
            raise LimitedBusyError(f"nothing was free within {TURN_SECONDS:g} s to work on it") from None
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
