"""The operations on KV caches that the prefix cache needs."""

from collections.abc import Sequence
from typing import Protocol

from exo.worker.runner_cuda.prefix.moved import Move
from exo.worker.runner_cuda.prefix.state import State


class Cells(Protocol):
    """The cells of the slots' KV caches, which ``bindings.Context`` owns."""

    @property
    def n_ctx(self) -> int:
        """The number of cells of one slot."""
        ...

    @property
    def can_cut(self) -> bool:
        """Whether the last tokens can be removed from a slot. Layers with a recurrent state cannot go back by one."""
        ...

    @property
    def forgets(self) -> bool:
        """Whether some layers keep only a window of cells or a recurrent state."""
        ...

    def length(self, slot: int) -> int:
        """Returns the number of tokens that a slot's cells are for."""
        ...

    def least(self, slot: int) -> int:
        """Returns the length of the shortest prefix, other than the empty one, to which a slot's cells can be cut."""
        ...

    def least_saved(self, length: int) -> int:
        """Returns the same of a saved state or a snapshot of ``length`` tokens."""
        ...

    def trim(self, slot: int, length: int) -> bool:
        """Keeps the first ``length`` cells of a slot. Returns false if the model's cache cannot be cut there."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copies all cells of one slot to another. It takes effect with the next decode, before that computes."""
        ...

    def wipe(self, slot: int, sound: int | None) -> None:
        """Empties a slot and overwrites its cells with those of the slot ``sound``, with the next decode.

        If ``sound`` is None, all slots are emptied and overwritten with zeros at once.
        """
        ...

    def save(self, slot: int, most: int) -> State:
        """Returns the cells of a slot; an empty array if that failed or they take more than ``most`` bytes."""
        ...

    def restore(self, slot: int, state: State) -> bool:
        """Replaces a slot's cells with saved ones. On failure, returns false and leaves the slot empty."""
        ...

    def snapshot(self, slot: int, most: int) -> State:
        """Returns the part of a slot's cells in layers that forget; an empty array as in ``save``."""
        ...

    def rewind(self, slot: int, state: State) -> bool:
        """Replaces that part with a snapshot. On failure, returns false and leaves the slot empty.

        The caller then cuts the slot to a length of the snapshot.
        """
        ...


class MovableCells(Cells, Protocol):
    """Cells of a single slot, which can be used at other positions."""

    def set_aside(self, slot: int, length: int, moves: Sequence[Move]) -> None:
        """Cuts a slot to ``length``, and keeps the cells of ``moves`` aside, rotated to their new positions."""
        ...

    def attach(self, slot: int, move: Move) -> None:
        """Puts the cells of a move that were set aside into the slot, which must end where they begin."""
        ...

    def drop_aside(self) -> None:
        """Frees all cells that are aside."""
        ...
