"""The KV cache of all slots, with the interface of mlx-lm's caches.

Invariant: a sequence has one row of a preallocated array, and the token at position p is in cell p. Joining, leaving,
trimming and reusing a prefix copy nothing, and a sequence's results do not depend on the length of others. A
sliding-window layer keeps all cells and is masked, so it can be trimmed like any other. mlx-lm instead pads sequences
on the left, and copies whole caches whenever one joins or leaves.
"""

from dataclasses import dataclass, field

import mlx.core as mx

BLOCK = 256
"""The number of cells is a multiple of this, which the fused attention of MLX's CUDA back end requires."""


@dataclass(slots=True)
class CachePass:
    """One forward pass: ``width`` tokens for each of ``slots``, from positions ``starts`` on.

    A pass is either the rows of a decode step, with width 1, or one chunk of a prompt, with one slot.
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
        """The first cell that any row attends to."""
        return 0 if window is None else max(0, min(self.starts) - window + 1)

    def mask(self, window: int | None, reach: int | None, *, as_array: bool) -> mx.array | str | None:
        """Returns the mask for ``scaled_dot_product_attention`` in a layer whose cells were read with ``reach``."""
        first = self.first(reach)
        if len(self.slots) == 1 and not as_array and (window is None or self.stop - first <= window):
            return "causal" if self.width > 1 else None
        known = self._masks.get((first, window))
        if known is None:
            known = self._masks[first, window] = self._mask(first, window)
        return known

    def _mask(self, first: int, window: int | None) -> mx.array:
        """Returns the mask, shape (rows, 1, width, cells read), which is true where a token attends to a cell."""
        cells = mx.arange(first, self.stop)
        tokens = (mx.array(self.starts)[:, None] + mx.arange(self.width))[:, None, :, None]
        seen = cells <= tokens
        return seen if window is None else seen & (cells > tokens - window)

    def write(self, store: mx.array, new: mx.array) -> None:
        """Writes ``new``, shape (rows, heads, width, dimensions), to ``store``, shape (slots, heads, cells, …)."""
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
        """Returns cells from ``first`` on, shape (rows, heads, cells, dimensions); a copy if slots have gaps."""
        if isinstance(self._rows, slice):
            return store[self._rows, :, first : self.stop]
        return mx.take(store[:, :, first : self.stop], self._rows, axis=0)


class LayerCache:
    """One layer's keys and values for all slots. mlx-lm's models call the public methods."""

    def __init__(self, cache: "KVCache", window: int | None) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._cache = cache
        self._window = window

    @property
    def offset(self) -> int | mx.array:
        """The position of each row's first new token: one number, or shape (rows,)."""
        return self._cache.at.offset

    def make_mask(self, _: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The attention mask of this pass."""
        return self._cache.at.mask(window_size or self._window, self._window, as_array=return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores the pass's keys and values, shape (rows, heads, width, dimensions), and returns all visible ones."""
        at = self._cache.at
        if self.keys is None or self.values is None:
            self.keys, self.values = self._cache.allocate(keys), self._cache.allocate(values)
        at.write(self.keys, keys)
        at.write(self.values, values)
        first = at.first(self._window)
        return at.read(self.keys, first), at.read(self.values, first)


class KVCache:
    """The caches of all layers. Call ``enter`` before each forward pass. The first pass allocates the arrays."""

    def __init__(self, windows: list[int | None], n_slots: int, n_ctx: int) -> None:
        """``windows`` are the layers' sliding windows in tokens, including the current one; None for full attention."""
        self.layers = [LayerCache(self, window) for window in windows]
        self.at: CachePass
        self.n_ctx = n_ctx
        self._n_slots = n_slots
        self._n_cells = -(-n_ctx // BLOCK) * BLOCK

    def enter(self, slots: list[int], starts: list[int], width: int) -> list[LayerCache]:
        """Returns the layers' caches, ready for one forward pass. The slots must be in ascending order."""
        self.at = CachePass(slots, starts, width)
        return self.layers

    def allocate(self, like: mx.array) -> mx.array:
        """Returns zeros for all cells of a layer with keys or values like these."""
        return mx.zeros((self._n_slots, like.shape[1], self._n_cells, like.shape[3]), like.dtype)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Overwrites the values in cells with zeros.

        A pass over several rows also reads cells beyond the end of the shorter ones. The mask zeroes a cell's weight,
        but 0 times NaN is NaN, and a failed or cancelled sequence may leave NaN behind.
        """
        for layer in self.layers:
            if layer.values is not None:
                layer.values[slot : slot + 1, :, start:stop] = 0

    def arrays(self) -> list[mx.array]:
        """All arrays. They are evaluated after a prompt chunk whose logits are not needed."""
        return [array for layer in self.layers for array in (layer.keys, layer.values) if array is not None]

    def marker(self, slot: int, cell: int) -> mx.array:
        """Returns a scalar that is computed once the last layer has written a cell. Its value has no meaning."""
        values = self.layers[-1].values
        assert values is not None
        return mx.sum(values[slot, :1, cell])
