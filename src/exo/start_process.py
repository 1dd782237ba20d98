"""Starts a process whose end is always waited for."""

import subprocess
from collections.abc import Mapping, Sequence

import anyio
from anyio.abc import Process


async def start_process(
    command: Sequence[str],
    *,
    stdin: int = subprocess.PIPE,
    stderr: int | None = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
) -> Process:
    """Starts a process with pipes, even if it is cancelled meanwhile. Raises ``OSError``.

    A start that is cancelled would kill the process, and nothing would wait for its end. The caller can.
    """
    process: Process | None = None
    with anyio.CancelScope(shield=True):
        process = await anyio.open_process(
            command, stdin=stdin, stderr=stderr, env=env, start_new_session=start_new_session
        )
    assert process is not None
    return process
