"""Streamed completions under faults: every token id, and the moments when the runner died."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from httptools import HttpParserError
from pydantic import ValidationError
from pydantic_core import to_json

from exo.bench.client import Client, Exchange
from exo.bench.options import BenchOptions
from exo.bench.reading import StreamedReply


@dataclass(slots=True)
class Cut:
    """The runner died when the stream had ``at`` tokens. ``seconds`` later the next one came."""

    at: int
    died: float
    seconds: float | None = None
    """None if another death or the end came first."""


@dataclass(slots=True)
class WatchedStream:
    """A stream of ``tokens`` tokens. Times are seconds by ``time.perf_counter``."""

    number: int
    tokens: int
    refused: int = 0
    """The status with which the server refused to begin, along with a Retry-After header, or 0."""
    error: str = ""
    cuts: list[Cut] = field(default_factory=list[Cut])
    reply: StreamedReply = field(default_factory=StreamedReply)
    seconds: float = 0.0

    @property
    def ids(self) -> list[int]:
        return self.reply.ids or []

    @property
    def done(self) -> bool:
        """Whether it ended with [DONE] and without an error."""
        return self.reply.done and not self.error

    @property
    def in_flight(self) -> bool:
        """Whether tokens have come and others are still to come."""
        return 0 < len(self.ids) < self.tokens and not self.done

    @property
    def usage_exact(self) -> bool:
        """Whether the usage states the tokens that were requested and received."""
        usage = self.reply.usage
        return (
            usage is not None
            and usage.completion_tokens == len(self.ids) == self.tokens
            and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        )

    def cut(self, died: float) -> None:
        """Records that the runner died. Everything that it had sent must have been read."""
        self.cuts.append(Cut(len(self.ids), died))

    async def read(
        self, client: Client, body: Mapping[str, object], on_tokens: Callable[[], None] | None = None
    ) -> None:
        """Runs the stream to its end. Errors of the server are stored, not raised."""
        wanted = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        exchange = Exchange(to_json({**body, **wanted, "max_tokens": self.tokens}))

        def heard() -> None:
            before = len(self.ids)
            moment, data = exchange.pieces[-1]
            try:
                self.reply.feed(moment, data)
            except (HttpParserError, ValidationError) as error:
                self.error = self.error or f"unreadable: {' '.join(str(error).split())[:300]}"
            if len(self.ids) > before:
                if self.cuts and self.cuts[-1].seconds is None:
                    self.cuts[-1].seconds = moment - self.cuts[-1].died
                if on_tokens is not None:
                    on_tokens()

        await client.send(exchange, heard)
        self.seconds = exchange.ended - exchange.began
        status = self.reply.status
        if status in (429, 503) and b"retry-after" in self.reply.headers:
            self.refused = status
        elif status not in (None, 200):
            self.error = f"status {status}: {self.reply.plain.decode(errors='replace')[:300]}"
        elif not self.done and not self.error:
            fault = self.reply.fault
            self.error = fault.message if fault else exchange.failure or "the stream ended without [DONE]"


@dataclass(frozen=True, slots=True)
class ExpectedReply:
    """A request for ``tokens`` tokens, and its expected text, or None if that may vary."""

    body: Mapping[str, object]
    tokens: int
    text: str | None = None


@dataclass(slots=True)
class Burst:
    """Replies by status, 0 for a broken connection, and the seconds to each complete refusal.

    ``wrong`` counts replies with another text or number of tokens, and refusals without Retry-After.
    """

    statuses: Counter[int] = field(default_factory=Counter[int])
    refused_seconds: list[float] = field(default_factory=list[float])
    wrong: int = 0

    @property
    def unexpected(self) -> int:
        """The number of requests that were neither served nor told to come again."""
        return sum(count for status, count in self.statuses.items() if status not in (200, 429, 503))

    async def ask(self, client: Client, asked: ExpectedReply) -> None:
        """Sends one request. Errors of the server are counted, not raised."""
        stream = WatchedStream(0, asked.tokens)
        await stream.read(client, asked.body)
        status = stream.reply.status or 0
        self.statuses[status] += 1
        if status == 200:
            served = stream.done and stream.usage_exact
            self.wrong += not (served and asked.text in (None, stream.reply.text))
        elif status:
            self.wrong += not stream.refused
        if status == 429:
            self.refused_seconds.append(stream.seconds)


def client_of(url: str) -> Client:
    """A client for completions."""
    return Client(BenchOptions(url=url, model="any"))


async def text_of(client: Client, asked: ExpectedReply) -> str:
    """The text that such a request gets without faults."""
    stream = WatchedStream(0, asked.tokens)
    await stream.read(client, asked.body)
    return stream.reply.text
