"""Asks other hosts once what they have, for commands that run without a server."""

from collections.abc import Sequence
from contextlib import suppress

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import ValidationError

from exo.start_process import start_process
from exo.worker.protocol.remote_host import RemoteHost
from exo.worker.router import RemoteHosts
from exo.worker.supervisor.node_messages import NODE_EVENTS, HostFound

_ANSWER_SECONDS = 30.0
_LONGEST_LINE = 8 << 20


async def ask_hosts(hosts: Sequence[RemoteHost]) -> RemoteHosts:
    """The hosts that answer, and why each of the others does not."""
    answers: dict[str, HostFound | str] = {}

    async def ask(host: RemoteHost) -> None:
        answers[host.name] = await _ask(host)

    async with anyio.create_task_group() as tasks:
        for each in hosts:
            tasks.start_soon(ask, each)
    found = {each.name: answers[each.name] for each in hosts}
    up = {name: answer.host for name, answer in found.items() if isinstance(answer, HostFound)}
    return RemoteHosts(up, {name: answer for name, answer in found.items() if isinstance(answer, str)})


async def _ask(host: RemoteHost) -> HostFound | str:
    command = host.command("exo", "node")
    try:
        process = await start_process(command)
    except OSError as error:
        return f"cannot be reached: {command[0]}: {error.strerror}"
    async with process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = BufferedByteReceiveStream(process.stdout)
        try:
            with anyio.fail_after(_ANSWER_SECONDS):
                while True:
                    event = NODE_EVENTS.validate_json(await lines.receive_until(b"\n", _LONGEST_LINE))
                    if isinstance(event, HostFound):
                        return event.other_version() or event
        except TimeoutError:
            return f"does not answer within {_ANSWER_SECONDS:g} s"
        except ValidationError:
            return f"does not answer as exo does; this command must run exo there: {' '.join(command)}"
        except anyio.IncompleteRead:
            said = b"".join([part async for part in process.stderr]).decode(errors="replace").strip()
            return f"cannot be reached: {said.rpartition(chr(10))[2][:300] or 'the connection ended'}"
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                process.kill()
