"""Admission control: a bounded queue for each model, and the end of all requests when the server stops."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from itertools import takewhile
from typing import final

import anyio

from exo.serving.errors import cancelled, queue_full, shutting_down


@final
class Queues:
    """Counts the requests of every model from their arrival to their end, in order of arrival.

    A model accepts as many sequences as its runners have slots, and ``max_queue`` more. ``slots`` returns the number of
    slots of a model id, 0 if it is unknown. This is no scheduler: the runners serve sequences first in, first out.
    """

    def __init__(self, max_queue: int, slots: Callable[[str], int]) -> None:
        self._queues: defaultdict[str, _Queue] = defaultdict(lambda: _Queue(max_queue))
        self._slots = slots
        self._closed = False
        self._left = anyio.Event()

    @property
    def closed(self) -> bool:
        """Whether the server is stopping and refuses requests."""
        return self._closed

    def held(self, model_id: str) -> int:
        """The number of sequences of requests that have not ended."""
        return self._queues[model_id].held

    @contextmanager
    def place(self, model_id: str, sequences: int, names: Collection[str] = ()) -> Generator["Place"]:
        """Holds places for ``sequences`` in the queue of a model while the context lasts.

        Raises ``ServingError``: ``queue_full`` if there are too few places, ``cancelled`` on exit of a request that
        ``cancel`` has ended by one of its ``names``, and ``shutdown`` if the server is stopping, either on entry or on
        exit of a request that ``drain`` has cut off. A request that is larger than the whole queue is admitted only
        when the queue is empty; otherwise it could never run.
        """
        if self._closed:
            raise shutting_down()
        queue = self._queues[model_id]
        place = Place(queue, sequences, lambda: max(1, self._slots(model_id)), names)
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
            raise cancelled() if place.cancelled else shutting_down()

    def cancel(self, name: str) -> bool:
        """Ends the requests with this name. Returns whether there is one."""
        found = [place for queue in self._queues.values() for place in queue.places if name in place.names]
        for place in found:
            place.cancelled = True
            place.scope.cancel()
        return bool(found)

    def slots_changed(self, model_id: str) -> None:
        """Wakes the requests that watch their place in the queue of a model."""
        self._queues[model_id].change()

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, waits until the others have ended, and cuts them off after ``seconds``."""
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

    def __init__(self, queue: "_Queue", sequences: int, slots: Callable[[], int], names: Collection[str]) -> None:
        self.sequences = sequences
        self.names = names
        self.cancelled = False
        self.scope = anyio.CancelScope()
        self._queue = queue
        self._slots = slots

    @property
    def slots(self) -> int:
        """The number of sequences that the model's runners can serve at once."""
        return self._slots()

    @property
    def number(self) -> int:
        """The place in the queue, counted in sequences: 1 for the next one, 0 once a slot is free."""
        return max(0, self._queue.ahead_of(self) - self.slots + 1)

    async def number_after(self, seen: int) -> int:
        """Waits until the number differs from ``seen``."""
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
        """Wakes the requests that watch their number. An arrival does not change the number of any other request."""
        self.changed.set()
        self.changed = asyncio.Event()

    def ahead_of(self, place: Place) -> int:
        """The number of sequences before those of ``place``."""
        return sum(each.sequences for each in takewhile(lambda each: each is not place, self.places))
