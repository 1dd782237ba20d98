"""The KV cache of all slots, in the form in which mlx-lm's models use theirs.

mlx-lm batches sequences of different lengths by padding them on the left and copies whole caches whenever one joins or
leaves. Here a sequence has a row of one preallocated array for as long as it runs, and the token at position p is in
cell p. So joining, leaving, trimming and reusing a prefix copy nothing; a sequence's numbers do not depend on how long
its neighbours are; and a sliding-window layer, which keeps all cells and is masked, can be trimmed like any other.
"""

from dataclasses import dataclass, field

import mlx.core as mx

BLOCK = 256
"""The number of cells is a multiple of this, as the fused attention of MLX's CUDA back end wants it."""


@dataclass(slots=True)
class CachePass:
    """One forward pass: ``width`` tokens for each of ``slots``, the first of them at ``starts``.

    Either of the two, slots and width, is 1: rows of a decoding step, or one chunk of a prompt.
    """

    slots: list[int]
    starts: list[int]
    width: int
    stop: int = field(init=False)
    offset: int | mx.array = field(init=False)
    _rows: slice | mx.array = field(init=False)
    _masks: dict[tuple[int, int | None], mx.array] = field(
        init=False, default_factory=dict[tuple[int, int | None], mx.array]
    )
    _cells: dict[int, tuple[mx.array, mx.array, mx.array]] = field(
        init=False, default_factory=dict[int, tuple[mx.array, mx.array, mx.array]]
    )

    def __post_init__(self) -> None:
        low, high = self.slots[0], self.slots[-1] + 1
        self.stop = max(self.starts) + self.width
        self.offset = mx.array(self.starts) if len(self.slots) > 1 else self.starts[0]
        self._rows = slice(low, high) if high - low == len(self.slots) else mx.array(self.slots)

    def first(self, window: int | None) -> int:
        """The first cell that any row looks at."""
        return 0 if window is None else max(0, min(self.starts) - window + 1)

    def mask(self, window: int | None, reach: int | None, *, as_array: bool) -> mx.array | str | None:
        """What ``scaled_dot_product_attention`` takes for a layer whose cells were read with ``reach``."""
        first = self.first(reach)
        if len(self.slots) == 1 and not as_array and (window is None or self.stop - first <= window):
            return "causal" if self.width > 1 else None
        known = self._masks.get((first, window))
        if known is None:
            known = self._masks[first, window] = self._mask(first, window)
        return known

    def _mask(self, first: int, window: int | None) -> mx.array:
        """Shape (rows, 1, width, cells read), true where a token sees a cell."""
        cells = mx.arange(first, self.stop)
        tokens = (mx.array(self.starts)[:, None] + mx.arange(self.width))[:, None, :, None]
        seen = cells <= tokens
        return seen if window is None else seen & (cells > tokens - window)

    def write(self, store: mx.array, new: mx.array) -> None:
        """Puts ``new``, shape (rows, heads, width, dimensions), into ``store``, shape (slots, heads, cells, …)."""
        if len(self.slots) == 1:
            slot, start = self.slots[0], self.starts[0]
            store[slot : slot + 1, :, start : start + self.width] = new
            return
        heads = new.shape[1]
        cells = self._cells.get(heads)
        if cells is None:
            rows = mx.array(self.slots)[:, None]
            cells = self._cells[heads] = (rows, mx.arange(heads)[None], mx.array(self.starts)[:, None])
        store[cells] = new.squeeze(2)

    def read(self, store: mx.array, first: int) -> mx.array:
        """Shape (rows, heads, cells from ``first`` on, dimensions). Copies only where slots are not consecutive."""
        if isinstance(self._rows, slice):
            return store[self._rows, :, first : self.stop]
        return mx.take(store[:, :, first : self.stop], self._rows, axis=0)


class LayerCache:
    """One layer's keys and values for all slots. The public names are those that mlx-lm's models call."""

    def __init__(self, cache: "KVCache", window: int | None) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._cache = cache
        self._window = window

    @property
    def offset(self) -> int | mx.array:
        """Position of each row's first new token: one for all, or shape (rows,)."""
        return self._cache.at.offset

    def make_mask(self, _: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The attention mask of this pass."""
        return self._cache.at.mask(window_size or self._window, self._window, as_array=return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores what a pass computed, shape (rows, heads, width, dimensions), and gives all that it may look at."""
        at = self._cache.at
        if self.keys is None or self.values is None:
            self.keys, self.values = self._cache.allocate(keys), self._cache.allocate(values)
        at.write(self.keys, keys)
        at.write(self.values, values)
        first = at.first(self._window)
        return at.read(self.keys, first), at.read(self.values, first)


class KVCache:
    """All layers. ``enter`` comes before each forward pass; the arrays are made in the first one."""

    def __init__(self, windows: list[int | None], n_slots: int, n_ctx: int) -> None:
        """``windows`` has for each layer how many tokens it sees, the current one included; None is all of them."""
        self.layers = [LayerCache(self, window) for window in windows]
        self.at: CachePass
        self.n_ctx = n_ctx
        self._n_slots = n_slots
        self._n_cells = -(-n_ctx // BLOCK) * BLOCK

    def enter(self, slots: list[int], starts: list[int], width: int) -> list[LayerCache]:
        """The layers, ready for one forward pass; slots in ascending order."""
        self.at = CachePass(slots, starts, width)
        return self.layers

    def allocate(self, like: mx.array) -> mx.array:
        """Zeros for all cells of a layer whose pass brought ``like``."""
        return mx.zeros((self._n_slots, like.shape[1], self._n_cells, like.shape[3]), like.dtype)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Makes sure that cells hold finite values.

        A pass over several rows also reads what lies beyond the shorter ones. The mask hides a cell's score, but not a
        value that is not a number, as a failed or cancelled sequence may leave it: 0 times NaN is NaN.
        """
        for layer in self.layers:
            if layer.values is not None:
                layer.values[slot : slot + 1, :, start:stop] = 0

    def arrays(self) -> list[mx.array]:
        """Everything to be evaluated after a prompt chunk, whose logits nobody asks for."""
        return [array for layer in self.layers for array in (layer.keys, layer.values) if array is not None]

    def marker(self, slot: int, cell: int) -> mx.array:
        """A number that is known once the last layer has written a cell, whatever it is."""
        values = self.layers[-1].values
        assert values is not None
        return mx.sum(values[slot, :1, cell])
