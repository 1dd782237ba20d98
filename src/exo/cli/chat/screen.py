"""Prints an answer while it comes: Markdown, dimmed reasoning, tool calls."""

import re
from types import TracebackType
from typing import Literal, Self, final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.terminal import printable

_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")
_FRAMES_A_SECOND = 10

Kind = Literal["content", "reasoning", "call"]


@final
class AnswerScreen:
    """A context that shows the parts of one answer. If the console is no terminal, content is printed unchanged.

    Blocks that can no longer change are printed once; only the end of the answer is redrawn. An answer may therefore
    be longer than the window, and all of it stays in the terminal's history.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._kind: Kind | None = None
        self._tail = ""
        """Text of one kind that is not printed yet."""
        self._waiting = Spinner("dots", text=Text("waiting", style="dim"))
        self._printed = self._over = False
        self._live = Live(
            console=console,
            get_renderable=self._drawn,
            refresh_per_second=_FRAMES_A_SECOND,
            transient=True,
            vertical_overflow="visible",
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._print(len(self._tail))
        self._live.stop()
        if not self._console.is_terminal:
            self._console.print()

    def note(self, text: str) -> None:
        self._waiting.update(text=Text(printable(text), style="dim"))

    def part(self, part: Part) -> None:
        match part:
            case Content(text):
                self._add("content", text)
            case Reasoning(text):
                self._add("reasoning", text)
            case ToolCall(_, name):
                self._add("call", f"\n{name} " if self._kind == "call" else f"{name} ")
            case Arguments(_, text):
                self._add("call", text)
            case BrokenCall(_, cut_off):
                self._add("call", " (cut off)" if cut_off else " (cannot be read as a call)")

    def _add(self, kind: Kind, text: str) -> None:
        if kind != self._kind:
            self._print(len(self._tail))
            self._kind = kind
        self._tail += printable(text)
        if not self._console.is_terminal:
            end = len(self._tail)
        elif kind == "content":
            end = settled(self._tail) if "\n" in text else 0
        else:
            end = self._tail.rfind("\n") + 1
        if end:
            self._print(end)

    def _print(self, end: int) -> None:
        """Prints the tail up to ``end`` permanently, above the redrawn part."""
        text, self._tail = self._tail[:end], self._tail[end:]
        if not self._console.is_terminal:
            self._console.file.write(text)
            self._console.file.flush()
        elif text.strip():
            apart, self._printed = self._printed and self._kind == "content", True
            self._live.refresh()  # otherwise the last drawing would appear again below
            if apart:
                self._console.print()
            self._console.print(_rendered(self._kind, text.rstrip("\n")))

    def _drawn(self) -> RenderableType:
        """The part that may still change. Called several times a second from another thread."""
        if tail := self._tail.strip("\n"):
            return _LastLines(_rendered(self._kind, tail))
        return "" if self._printed or self._over else self._waiting


@final
class _LastLines:
    """The last lines that fit into the window: only those can be redrawn."""

    def __init__(self, whole: RenderableType) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._whole, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def settled(text: str) -> int:
    """The end of the Markdown that later text cannot change: a blank line, or the end of fenced code."""
    at = end = 0
    fence = ""
    for line in text.split("\n")[:-1]:
        at += len(line) + 1
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence, end = "", at
        elif mark:
            fence = mark[1]
        elif not line.strip():
            end = at
    return end


def _rendered(kind: Kind | None, text: str) -> RenderableType:
    match kind:
        case "content":
            return Markdown(text)
        case "call":
            return Text(f"calls {text}", style="cyan")
        case _:
            return Text(text, style="dim italic")
