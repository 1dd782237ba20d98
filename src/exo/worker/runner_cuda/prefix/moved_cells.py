"""Uses cached tokens of a prompt at other positions (``cache_reuse``)."""

from collections.abc import Iterable
from dataclasses import dataclass

from exo.worker.runner_common.sequence import common_prefix
from exo.worker.runner_cuda.prefix.cells import MovableCells
from exo.worker.runner_cuda.prefix.host_tier import Saved
from exo.worker.runner_cuda.prefix.moved import Move, moved
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.slot import Slot


@dataclass(frozen=True, slots=True)
class MovedPrefix:
    """Cached tokens of a prompt: its first ``length``, and those of ``moves``, which the holder has elsewhere."""

    holder: Slot | Saved
    length: int
    moves: list[Move]

    @property
    def n_tokens(self) -> int:
        """The number of cached tokens."""
        return self.length + sum(move.length for move in self.moves)


class MovedCells:
    """Moves cells within the only slot: they are set aside, and attached when the tokens before them are computed."""

    def __init__(self, cells: MovableCells, least: int) -> None:
        """``least``: parts of a prompt of at least so many tokens are moved."""
        self._cells = cells
        self._least = least

    def find(self, sequence: Sequence, holders: Iterable[Slot | Saved], n_found: int) -> MovedPrefix | None:
        """Returns where most of a prompt's tokens are.

        None if a prefix of ``n_found`` tokens is nearly as good, or the request does without moved cells.
        """
        if sequence.exact or not sequence.reads_cache or sequence.pictures:
            return None
        tokens, most, best = sequence.tokens[:-1], n_found + self._least - 1, None
        for holder in holders if len(tokens) > most else ():
            length = common_prefix(holder.cached, tokens)
            found = MovedPrefix(holder, length, moved(holder.cached, tokens, length, self._least))
            if found.moves and found.n_tokens > most:
                best, most = found, found.n_tokens
        return best

    def set_aside(self, slot: Slot, sequence: Sequence, found: MovedPrefix) -> None:
        """Cuts the slot's cells to the prefix, and sets the others aside for the sequence."""
        self._cells.set_aside(slot.id, found.length, found.moves)
        sequence.moves = found.moves

    def attach(self, slot: Slot, sequence: Sequence) -> None:
        """Puts the sequence's cells that are aside into the slot, if they come next."""
        while sequence.moves and sequence.moves[0].target == len(slot.cached):
            move = sequence.moves.pop(0)
            self._cells.attach(slot.id, move)
            slot.cached += sequence.tokens[move.target : move.target + move.length]
            slot.exact = min(slot.exact, move.target)

    def drop(self, sequence: Sequence) -> None:
        """Frees the cells that are aside for the sequence."""
        if sequence.moves:
            self._cells.drop_aside()
