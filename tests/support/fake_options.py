"""The fake runner's table in a model card: its sizes, and its faults."""

import signal
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, JsonValue

from exo.worker.protocol.messages import Message

CONTEXTS = (4096, 2048, 1024, 512)
"""The contexts for ``n_ctx = "auto"``; for the second one others are unloaded."""


def _context(value: JsonValue) -> JsonValue:
    return 0 if value == "auto" else value


class FakeOptions(Message):
    """The engine table of the model card. Counts of tokens are for the whole process, not for one request."""

    slots: int = 4
    n_ctx: Annotated[int, BeforeValidator(_context)] = 4096
    """0, or "auto": one of ``CONTEXTS``."""
    memory: int = 0
    """Bytes that the estimate adds, as if they were taken with the first request."""
    memory_per_token: int = 0
    """The same, for each token of the context."""
    on_devices: Mapping[str, int] = {}
    """Bytes of the estimate on each device."""
    chunk: int = 256
    """Prompt tokens that one step computes."""
    step_seconds: float = 0.0
    load_steps: int = 2
    load_gate: str = ""
    """A FIFO: loading continues once it has been opened for writing."""
    load_step_seconds: float = 0.0
    """Duration of one of them; the heartbeat continues meanwhile."""
    hang: Literal["estimate", "load", "request"] | None = None
    """Where the main thread hangs while another thread sends the heartbeat."""
    hang_computing: bool = False
    """Whether it hangs in a loop that computes."""
    fail_load: str = ""
    eos_after: int | None = None
    """Output tokens of one request before the end-of-generation token."""
    answer: str = ""
    """The text of every output, in place of the model's own."""
    die_after: int | None = None
    """Tokens until the process ends with ``die_with``: an exit code, or the negative number of a signal."""
    die_with: int = -signal.SIGKILL
    die_at: int | None = None
    """Like ``die_after``, but counts the output of one request over all its runners: a replay dies there again."""
    say_after: int | None = None
    """Tokens until ``say`` is written to the protocol stream unchanged."""
    say: str = ""
    overlong_for: str = ""
    """A text for whose tokenization the answer is a line that is longer than the limit."""
    ignore_shutdown: bool = False
    """Whether it also ignores the end of its input, and SIGTERM."""
    stderr_lines: int = 0
    log_commands: bool = False
    embeddings: bool = True
    rerank: bool = True
    mmproj: str | None = None
    """Any name: it takes pictures, as models with a projector do."""
    chat_template: str | None = None
    template_file: str = ""
    """The file with the chat template, in place of a model's file."""
