"""The edge to mlx-lm: only this file uses its models, their caches and its tokenizers. Written for mlx-lm 0.32.2.

mlx-lm's ``BatchGenerator`` is not used, for three reasons. It computes a chunk of every prompt per step, so that long
prompts stall decoding. It draws from one global random state, so that a seed has no meaning in a batch. It cannot trim
the caches of sliding-window models, so that these cannot reuse prefixes. Its models are called with the caches of
``kv_cache``.
"""

import resource
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Protocol, cast

import mlx.core as mx

from exo.worker.runner_common.hf_tokenizer import HfTokenizer
from exo.worker.runner_common.load_error import LoadError, from_library
from exo.worker.runner_common.model_files.adapter_folder import AdapterFolder
from exo.worker.runner_common.model_files.folder_config import Json
from exo.worker.runner_common.model_files.model_folder import HfFolder, end_tokens, presented
from exo.worker.runner_mlx.adapters import AdapterRows, adapt
from exo.worker.runner_mlx.kv_cache import KVCache, LayerCache
from exo.worker.runner_mlx.loading.positions import WantedPositions, apply
from exo.worker.runner_mlx.ranks.messages import Clear, Pass, TextPass
from exo.worker.runner_mlx.ranks.pipeline import Body
from exo.worker.runner_mlx.ranks.sharding import RankPart


@contextmanager
def _limits_kept() -> Generator[None]:
    """Keeps RLIMIT_NOFILE. Importing mlx_lm.utils lowers it, with the hard limit, which only root could raise again."""
    set_limit = resource.setrlimit

    def ignore(resource: int, limits: tuple[int, int], /) -> None: ...

    resource.setrlimit = ignore
    try:
        yield
    finally:
        resource.setrlimit = set_limit


with _limits_kept():
    mlx_lm = import_module("mlx_lm.utils")

# Both packages are only partly typed, so plain imports would not type-check.
caches = import_module("mlx_lm.models.cache")
_flatten: Callable[[object], list[tuple[str, mx.array]]] = import_module("mlx.utils").tree_flatten
wait_for: Callable[..., None] = import_module("mlx.core").eval
"""Computes arrays, given singly or in lists, and waits."""
queue: Callable[..., None] = import_module("mlx.core").async_eval
"""Starts to compute arrays, without waiting."""

BROKEN_MODEL = (Exception, SystemExit)
"""The errors that a broken folder may cause. mlx-lm, transformers and tokenizers have no class for them, and one of
mlx-lm's modules ends the process if a package is missing."""

ONE_SEQUENCE = frozenset({"gemma2"})
"""Model types for which mlx-lm's attention misreads the mask of several sequences."""


class _CacheKind(Protocol):
    """One of mlx-lm's own caches, by which a layer shows its window. Both are attributes of a ``RotatingKVCache``."""

    keep: int
    max_size: int


class _NetworkLayer(Protocol):
    def parameters(self) -> Mapping[str, object]: ...


class _Network(Protocol):
    """The part of mlx-lm's models that this file uses."""

    layers: Sequence[_NetworkLayer]

    def __call__(self, inputs: mx.array, cache: Sequence[LayerCache]) -> mx.array: ...
    def parameters(self) -> Mapping[str, object]: ...
    def set_dtype(self, dtype: mx.Dtype) -> None: ...


class MlxTokenizer(HfTokenizer, Protocol):
    """mlx-lm's wrapper, which has all ids that end generation."""

    eos_token_ids: set[int]


class MlxModel:
    """A loaded network, or this rank's ``part`` of one that is divided between processes.

    Invariant: every call on rank 0 is first sent to the other ranks, which make the same call on their parts.
    ``windows`` are the layers' sliding windows in tokens, None for full attention.
    """

    def __init__(
        self,
        folder: HfFolder,
        positions: WantedPositions | None,
        dtype: str | None,
        on_layer: Callable[[int, int], None],
        part: RankPart | None = None,
    ) -> None:
        """Loads the weights. ``on_layer`` gets the layers loaded and the layers in all. Raises LoadError."""
        self._part = part
        self._adapters = AdapterRows()
        try:
            with presented(folder, folder.config) as view:
                network, config = mlx_lm.load_model(view, lazy=True)
            if positions is not None:
                apply(network, positions)
            self._network: _Network = network
            if dtype is not None:
                self._network.set_dtype(cast(mx.Dtype, getattr(mx, dtype)))
            self.size_bytes = sum(array.nbytes for _, array in _flatten(self._network.parameters()))
            self.windows = [_window(kind) for kind in caches.make_prompt_cache(network)]
            self._body = _body(self._network)
            if part is not None:
                part.take(network, self._body, self.windows)
            self.n_layers = len(self._network.layers)
            for index, layer in enumerate(self._network.layers):
                wait_for(layer.parameters())
                on_layer(index + 1, self.n_layers)
            if part is None or part.has_results:
                wait_for(self._network.parameters())
        except BROKEN_MODEL as error:
            raise load_error(f"mlx-lm could not load {folder.path}", error) from error
        self.eos_token_ids = end_tokens(folder.path, config.get("eos_token_id"))

    def add_adapters(self, adapters: Sequence[AdapterFolder]) -> None:
        """Adds adapters, which ``forward`` knows by their numbers from 1. Raises LoadError."""
        if not adapters:
            return
        try:
            wait_for(adapt(self._network, adapters, self._adapters))
        except LoadError:
            raise
        except BROKEN_MODEL as error:
            raise load_error("mlx-lm's network cannot take the adapters of [[mlx.lora]]", error) from error

    def forward(
        self,
        tokens: mx.array,
        cache: KVCache,
        slots: list[int],
        starts: list[int],
        *,
        whole: bool = True,
        adapters: Sequence[int] = (),
    ) -> mx.array:
        """Queues one pass over tokens, shape (rows, width). Returns the logits, shape (rows, width, vocabulary).

        The tokens are the next ones of ``slots``, in ascending order, from positions ``starts`` on. Without ``whole``,
        the pass only fills the cache, and the logits must not be used. ``adapters`` has each row's adapter, or 0.
        """
        width = tokens.shape[1]
        self._adapters.rows = mx.array([*adapters]) if any(adapters) else None
        layers = cache.enter(slots, starts, width)
        if self._part is None:
            return self._network(tokens, layers)
        self._part.tell(Pass(slots=slots, starts=starts, width=width, whole=whole))
        logits = self._network(_shared(tokens, self._part), layers)
        queue(self._part.computed(cache.arrays(), logits if whole else None))
        return logits

    def states(self, tokens: mx.array, cache: KVCache, start: int) -> mx.array:
        """Queues one pass without the head over the next tokens, shape (1, width), of a text with its own ``cache``.

        Returns the normalised hidden states, shape (1, width, hidden size).
        """
        assert self._body is not None
        width = tokens.shape[1]
        self._adapters.rows = None
        layers = cache.enter([0], [start], width)
        if self._part is None:
            return self._body(tokens, layers)
        self._part.tell(TextPass(start=start, width=width, cells=cache.n_ctx))
        states = self._body(_shared(tokens, self._part), layers)
        queue(self._part.computed(cache.arrays(), states))
        return states

    def has_states(self) -> bool:
        """Whether ``states`` works for this network. Computes nothing."""
        layers = KVCache(self.windows, 1, 2).enter([0], [0], 2)
        try:
            return self._body is not None and self._body(mx.array([[0, 0]]), layers).shape[:2] == (1, 2)
        except BROKEN_MODEL:
            return False

    def clear(self, cache: KVCache, slot: int, start: int, stop: int) -> None:
        """Calls ``cache.clear`` on all ranks."""
        if self._part is not None:
            self._part.tell(Clear(slot=slot, start=start, stop=stop))
        cache.clear(slot, start, stop)


def network_class(config: Json) -> type:
    """Returns mlx-lm's class for a model type. Raises LoadError if it has none."""
    try:
        return mlx_lm._get_classes(config)[0]
    except BROKEN_MODEL as error:
        raise load_error("mlx-lm cannot load this kind of model", error) from error


def cached_elements(config: Json) -> list[int]:
    """Returns the elements of one token's keys and values in each layer that keeps some of its own.

    A pass over a network without weights shows it, and is not evaluated. Raises LoadError.
    """
    try:
        network_of, arguments_of = mlx_lm._get_classes(config)
        network: _Network = network_of(arguments_of.from_dict(config))
        cache = KVCache([_window(kind) for kind in caches.make_prompt_cache(network)], 1, 1)
        network(mx.array([[0]]), cache.enter([0], [0], 1))
    except BROKEN_MODEL as error:
        raise load_error("mlx-lm cannot load this model", error) from error
    stored = [(layer.keys, layer.values) for layer in cache.layers]
    return [sum(array.shape[1] * array.shape[3] for array in pair if array is not None) for pair in stored]


def open_tokenizer(folder: HfFolder, eos_token_ids: list[int]) -> MlxTokenizer:
    """Opens the tokenizer. ``eos_token_ids`` are added to the ids in its own files. Raises LoadError."""
    try:
        with presented(folder, folder.written) as view:
            return mlx_lm.load_tokenizer(view, {"trust_remote_code": False}, eos_token_ids=eos_token_ids)
    except BROKEN_MODEL as error:
        strict = "Strict" in type(error).__name__  # of transformers' check of a configuration
        what = f"{folder.path / 'config.json'} is refused by transformers" if strict else ""
        raise load_error(what or f"mlx-lm could not load the tokenizer in {folder.path}", error) from error


def keep_weights_in_memory() -> None:
    """Asks the system not to page out a model of the recommended size on Metal. Does nothing elsewhere."""
    mlx_lm.maybe_set_recommended_wired_limit()


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the error means a lack of memory, for which MLX has no class."""
    low = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in low for sign in ("unable to allocate", "out of memory", "insufficient memory", "maximum allowed buffer")
    )


def load_error(what: str, error: BaseException) -> LoadError:
    """Makes a LoadError that quotes the library's error."""
    return from_library(what, error, out_of_memory=ran_out_of_memory(error))


def _shared(tokens: mx.array, part: RankPart) -> mx.array:
    """Returns rank 0's tokens on every rank, queued before the rest of the pass.

    It must be queued by itself, because the values that a rank receives from another do not depend on it.
    """
    shared = part.share(tokens)
    queue(shared)
    return shared


def _body(network: object) -> Body | None:
    """Returns the network without its head, if it has the name that nearly all of mlx-lm's models use."""
    body = getattr(getattr(network, "language_model", network), "model", None)
    return cast(Body, body) if callable(body) else None


def _window(kind: _CacheKind) -> int | None:
    """Returns a layer's window in tokens. Raises ValueError for a layer whose cache is not keys and values."""
    if type(kind) is caches.KVCache:
        return None
    if type(kind) is caches.RotatingKVCache and kind.keep == 0:
        return kind.max_size
    raise ValueError(f"a layer of this model keeps a {type(kind).__name__}, which this runner cannot batch")
