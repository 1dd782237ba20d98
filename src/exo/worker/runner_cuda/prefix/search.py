"""Finds the cached prefixes of a prompt, in the slots and in RAM."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from exo.worker.runner_common.sequence import common_prefix
from exo.worker.runner_cuda.prefix.cells import Cells
from exo.worker.runner_cuda.prefix.host_tier import Checkpoint, HostTier, Saved, Usable
from exo.worker.runner_cuda.prefix.radix_tree import BLOCK, PrefixTree
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.slot import Slot

WORTH_WAITING = 64
"""A request waits for another slot's prefill if that is about to compute at least this many tokens of its prompt."""

Holder = Slot | Saved
Reach = tuple[int, Checkpoint | None]
"""The length of a usable prefix, and the checkpoint that it needs."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """A cached prefix: ``length`` tokens now, ``promised`` once the holder's sequence is computed."""

    holder: Holder
    length: int
    promised: int
    checkpoint: Checkpoint | None = None
    """The checkpoint that ``length`` needs."""

    @property
    def is_awaited(self) -> bool:
        """Whether the request should wait for the sequence that is computing the rest of the prefix."""
        return self.promised - self.length >= WORTH_WAITING


class PrefixSearch:
    """Looks prefixes up in what ``PrefixCache`` keeps, and changes nothing."""

    def __init__(self, cells: Cells, host: HostTier, tree: PrefixTree[Holder]) -> None:
        self._cells = cells
        self._host = host
        self._tree = tree

    def longest(self, sequence: Sequence) -> CachedPrefix | None:
        """Returns the longest prefix of a sequence that is cached or about to be, of at least one block.

        The last token is always computed, because the first new token is sampled from its logits.
        """
        if not sequence.reads_cache or sequence.parked is not None or sequence.alone:
            return None
        tokens, adapter = sequence.tokens, sequence.adapter
        usable = self._host.usable(tokens, adapter)
        best: CachedPrefix | None = None
        seen: set[Holder] = set()
        for depth, holders in self._tree.matches(tokens, adapter):
            if best is not None and best.promised >= depth + BLOCK - 1:
                break
            able = (each for each in holders - seen if not sequence.exact or each.exact >= len(each.cached))
            found = [self._found(holder, sequence, depth, usable) for holder in able]
            seen |= holders
            best = max(
                [*found, *([best] if best is not None else ())],
                key=lambda each: (each.promised, each.length, isinstance(each.holder, Slot)),
                default=None,
            )
        return best if best is not None and best.promised else None

    def reach(self, holder: Holder, length: int, usable: Tokens[Usable]) -> Reach:
        """Returns the longest prefix of at most ``length`` tokens to which the holder's cells can be cut."""
        if length >= (holder.least if isinstance(holder, Saved) else self._cells.least(holder.id)):
            return length, None
        reaches = ((min(length, each.most), each.checkpoint) for each in usable if each.least <= length)
        return max(reaches, key=lambda reach: reach[0], default=(0, None))

    def held_elsewhere(self, slot: Slot, usable: Tokens[Usable]) -> int:
        """Returns how many leading tokens of the slot are cached in another place, in whole blocks."""
        best = 0
        for depth, holders in self._tree.matches(slot.cached, slot.adapter):
            if best >= depth:
                break
            others = (each for each in holders if each is not slot and len(each.cached) >= depth)
            best = max([best, *(self.reach(each, depth, usable)[0] for each in others)])
        return best

    def _found(self, holder: Holder, sequence: Sequence, depth: int, usable: Tokens[Usable]) -> CachedPrefix:
        prompt = sequence.tokens
        common = depth + common_prefix(holder.tokens[depth : depth + BLOCK], prompt[depth : depth + BLOCK])
        common = sequence.uncut(min(common, len(prompt) - 1))
        length, checkpoint = self.reach(holder, sequence.uncut(min(common, len(holder.cached))), usable)
        return CachedPrefix(holder, length, common if common > len(holder.cached) else length, checkpoint)
