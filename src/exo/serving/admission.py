"""Who waits for a model: one bounded queue for each, and how all of them end when the server stops."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import takewhile
from typing import final

import anyio

from exo.serving.errors import queue_full, shutting_down


@final
class Queues:
    """The requests of every model, from their arrival to their end, in order of arrival.

    They are counted in sequences. A model holds as many as its runners have slots, and ``max_queue`` more; ``slots``
    tells the former by model id, and 0 while it is not known. This is an account and no scheduler: the order in which
    sequences are served is the runner's, first in, first out.
    """

    def __init__(self, max_queue: int, slots: Callable[[str], int]) -> None:
        self._queues: defaultdict[str, _Queue] = defaultdict(lambda: _Queue(max_queue))
        self._slots = slots
        self._closed = False
        self._left = anyio.Event()

    @property
    def closed(self) -> bool:
        """Whether the server is stopping and takes no more requests."""
        return self._closed

    def held(self, model_id: str) -> int:
        """Sequences of the requests that have not ended."""
        return self._queues[model_id].held

    @contextmanager
    def place(self, model_id: str, sequences: int) -> Generator["Place"]:
        """Holds places for ``sequences`` while the context lasts; the only way to take any or to give them back.

        Raises ``ServingError`` 429 where there are too few, and 503 when the server is stopping, on entry or, where
        ``drain`` cuts the request off, on exit. A request that is larger than the whole queue is let in alone, for
        it would never be otherwise.
        """
        if self._closed:
            raise shutting_down()
        queue = self._queues[model_id]
        place = Place(queue, sequences, lambda: max(1, self._slots(model_id)))
        if queue.held and queue.held + sequences > place.slots + queue.max_waiting:
            raise queue_full(model_id, queue.held)
        queue.add(place)
        try:
            with place.scope:
                yield place
        finally:
            queue.remove(place)
            self._left.set()
        if place.scope.cancelled_caught:
            raise shutting_down()

    def slots_changed(self, model_id: str) -> None:
        """Has the places of a model told anew."""
        self._queues[model_id].change()

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, waits until those that are here have ended, and after ``seconds`` cuts them off."""
        self._closed = True
        with anyio.move_on_after(seconds):
            await self._empty()
        self.cut()
        await self._empty()

    def cut(self) -> None:
        """Ends every request with an error for its client."""
        for queue in self._queues.values():
            for place in queue.places:
                place.scope.cancel()

    async def _empty(self) -> None:
        while any(queue.places for queue in self._queues.values()):
            self._left = anyio.Event()
            await self._left.wait()


@final
class Place:
    """One request in the queue of its model."""

    def __init__(self, queue: "_Queue", sequences: int, slots: Callable[[], int]) -> None:
        self.sequences = sequences
        self.scope = anyio.CancelScope()
        self._queue = queue
        self._slots = slots

    @property
    def slots(self) -> int:
        """Sequences that the model's runners can serve at once."""
        return self._slots()

    @property
    def number(self) -> int:
        """1 for the request that is served next, counted in sequences; 0 once a slot is free for it."""
        return max(0, self._queue.ahead_of(self) - self.slots + 1)

    async def number_after(self, seen: int) -> int:
        """Waits until the number is another one than ``seen``."""
        while (number := self.number) == seen:
            await self._queue.changed.wait()
        return number


@final
class _Queue:
    """The places of one model, in order of arrival."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.places: dict[Place, None] = {}
        self.held = 0
        self.changed = asyncio.Event()

    def add(self, place: Place) -> None:
        self.places[place] = None
        self.held += place.sequences

    def remove(self, place: Place) -> None:
        del self.places[place]
        self.held -= place.sequences
        self.change()

    def change(self) -> None:
        """Wakes those who watch their number. An arrival changes nobody else's."""
        self.changed.set()
        self.changed = asyncio.Event()

    def ahead_of(self, place: Place) -> int:
        """Sequences that came before those of ``place``."""
        return sum(each.sequences for each in takewhile(lambda each: each is not place, self.places))
