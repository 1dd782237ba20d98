"""Sends requests: a fixed number at a time, at random moments, or a long prompt among running streams."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import final

import anyio

from exo.bench.client import Client, Exchange

_SETTLED = 24
"""Reads of every stream before the long prompt is sent. Their latencies are the reference."""


async def closed_loop(client: Client, bodies: Sequence[bytes], concurrency: int, limit: float) -> list[Exchange]:
    """``concurrency`` clients send one request after another. After ``limit`` seconds all hang up."""
    exchanges: list[Exchange] = []

    async def one_client(waiting: Iterator[bytes]) -> None:
        for body in waiting:
            exchanges.append(exchange := Exchange(body))
            await client.send(exchange)

    with anyio.move_on_after(limit):
        async with anyio.create_task_group() as tasks:
            waiting = iter(bodies)
            for _ in range(concurrency):
                tasks.start_soon(one_client, waiting)
    return exchanges


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """The times of requests in seconds from the start: a Poisson process with ``rate`` requests per second."""
    random = Random(seed)
    moment, due = 0.0, list[float]()
    for _ in range(count):
        due.append(moment)
        moment += random.expovariate(rate)
    return due


async def open_loop(client: Client, bodies: Sequence[bytes], due: Sequence[float], limit: float) -> list[Exchange]:
    """Sends each body when it is due. Latencies count from then on, even if this process is late."""
    exchanges: list[Exchange] = []
    with anyio.move_on_after(limit):
        async with anyio.create_task_group() as tasks:
            start = time.perf_counter()
            for body, moment in zip(bodies, due, strict=True):
                await anyio.sleep(max(0.0, start + moment - time.perf_counter()))
                exchanges.append(exchange := Exchange(body, began=start + moment))
                tasks.start_soon(client.send, exchange)
    return exchanges


@final
@dataclass(slots=True)
class Interruption:
    """Streams that run all the time, and the exchange of the long prompt after it has been sent."""

    streams: list[Exchange] = field(default_factory=list[Exchange])
    long: Exchange | None = None
    _current: dict[int, Exchange] = field(default_factory=dict[int, Exchange])
    _goals: dict[int, int] = field(default_factory=dict[int, int])
    _reached: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, client: Client, bodies: Iterator[bytes], streams: int, long: bytes, limit: float) -> None:
        """Sends ``long`` when all streams run. Ends when each has had text after it, or after ``limit`` seconds."""
        with anyio.move_on_after(limit):
            async with anyio.create_task_group() as tasks:
                self._wait_for(dict.fromkeys(range(streams), _SETTLED))
                for number in range(streams):
                    tasks.start_soon(self._stream, client, bodies, number)
                await self._reached.wait()
                self.long = Exchange(long)
                await client.send(self.long)
                self._wait_for({number: len(each.pieces) + 1 for number, each in self._current.items()})
                await self._reached.wait()
                tasks.cancel_scope.cancel()

    def _wait_for(self, goals: dict[int, int]) -> None:
        self._goals, self._reached = goals, anyio.Event()

    async def _stream(self, client: Client, bodies: Iterator[bytes], number: int) -> None:
        for body in bodies:
            self._current[number] = exchange = Exchange(body)
            self.streams.append(exchange)
            await client.send(exchange, lambda: self._heard(number))
            if exchange.failure:
                return
            self._reach(number)

    def _heard(self, number: int) -> None:
        if len(self._current[number].pieces) >= self._goals.get(number, 1 << 62):
            self._reach(number)

    def _reach(self, number: int) -> None:
        self._goals.pop(number, None)
        if not self._goals:
            self._reached.set()
