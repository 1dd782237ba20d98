"""Finds the holders of a prompt's longest common prefix, at a cost that does not depend on the number of holders."""

from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

BLOCK = 16
"""Tokens of one node. The caller compares the tokens beyond whole blocks."""

Holder = TypeVar("Holder", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Node(Generic[Holder]):
    """Stands for the tokens on the path from the root. Each of ``holders`` has at least these."""

    children: dict[bytes, "_Node[Holder]"] = field(default_factory=dict[bytes, "_Node[Holder]"])
    holders: set[Holder] = field(default_factory=set[Holder])


class PrefixTree(Generic[Holder]):
    """A radix tree over blocks of token ids. Prefixes with different adapters share no nodes.

    Invariant: a holder is in every node on the path of its tokens, and a node without holders is removed.
    """

    def __init__(self) -> None:
        self._root: _Node[Holder] = _Node()
        self._paths: dict[Holder, list[tuple[bytes, _Node[Holder]]]] = {}

    def put(self, holder: Holder, tokens: Sequence[int], adapter: str = "") -> None:
        """Extends a holder's tokens to ``tokens``, which must begin with its earlier ones."""
        path = self._paths.setdefault(holder, [])
        node = path[-1][1] if path else self._root
        for block in _blocks(tokens, len(path), adapter):
            node = node.children.setdefault(block, _Node())
            node.holders.add(holder)
            path.append((block, node))

    def cut(self, holder: Holder, length: int) -> None:
        """Shortens a holder's tokens to the first ``length``; 0 removes it."""
        path = self._paths.get(holder, [])
        while len(path) > length // BLOCK:
            block, node = path.pop()
            node.holders.remove(holder)
            if not node.holders:
                del (path[-1][1] if path else self._root).children[block]
        if not path:
            self._paths.pop(holder, None)

    def holders(self) -> list[Holder]:
        """Returns those with at least one block."""
        return list(self._paths)

    def matches(self, tokens: Sequence[int], adapter: str = "") -> Iterator[tuple[int, frozenset[Holder]]]:
        """Yields prefix lengths of ``tokens`` in whole blocks, longest first, each with its holders."""
        nodes: list[_Node[Holder]] = []
        node = self._root
        for block in _blocks(tokens, 0, adapter):
            if (child := node.children.get(block)) is None:
                break
            node = child
            nodes.append(node)
        for depth in range(len(nodes), 0, -1):
            yield depth * BLOCK, frozenset(nodes[depth - 1].holders)


def _blocks(tokens: Sequence[int], first: int, adapter: str) -> Iterator[bytes]:
    kind = adapter.encode()
    for start in range(first * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        yield array("i", tokens[start : start + BLOCK]).tobytes() + kind
