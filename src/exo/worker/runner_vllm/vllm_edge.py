"""The edge to vLLM: only this file, ``sampler`` and ``sight`` use it. Written for vLLM 0.32.

vLLM's engine core batches requests of token ids, in this process and this thread. A step is one call, and no process is
left over if this one is killed. A model on several devices has one process for each, which vLLM ends with this one.
"""

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from exo.worker.runner_common.commands import TextJob
from exo.worker.runner_common.hf_embedding import Pooling
from exo.worker.runner_common.hf_tokenizer import HfTokenizer
from exo.worker.runner_common.sequence import Scores
from exo.worker.runner_vllm.options import load_error
from exo.worker.runner_vllm.sampler import CHOICE
from exo.worker.runner_vllm.sequence import VllmSequence

# None of these packages is in the environment that checks types, so plain imports would not type-check.
arguments = import_module("vllm.engine.arg_utils")
engine = import_module("vllm.v1.engine")
engine_core = import_module("vllm.v1.engine.core")
executor = import_module("vllm.v1.executor")
lora_request = import_module("vllm.lora.request")
pooler = import_module("vllm.config.pooler")
pooling_params = import_module("vllm.pooling_params")
sampling_params = import_module("vllm.sampling_params")
transformers = import_module("transformers")

BROKEN_MODEL = (Exception, SystemExit)
"""The errors that a broken folder or wrong settings may cause. vLLM, transformers and tokenizers have no class for
them."""


class _Logprobs(Protocol):
    """vLLM's log-probabilities of some rows, as arrays or tensors."""

    logprob_token_ids: npt.NDArray[np.int32]
    """Shape (rows, 1 + number of the most probable tokens). The row's token comes first."""
    logprobs: npt.NDArray[np.float32]
    """The log-probabilities of these tokens, in the same shape."""


class _EngineOutput(Protocol):
    """The part of the engine core's output that this file uses."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: _Logprobs | None
    new_prompt_logprobs_tensors: _Logprobs | None
    finish_reason: int | None
    pooling_output: "_Tensor | None"
    num_nans_in_logits: int


class _Tensor(Protocol):
    def numpy(self) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Output:
    """The results of a step for one request."""

    id: str
    token: int | None
    scores: Scores | None = None
    prompt_scores: list[Scores] | None = None
    """Scores of the prompt's tokens from the second on, once all are computed."""
    vector: npt.NDArray[np.float64] | None = None
    """A text's pooled vector, shape (size,)."""
    broken: bool = False
    """The model computed NaN, or vLLM aborted the request."""


@dataclass(slots=True)
class Progress:
    """The progress of one request, from vLLM's own record of it."""

    request: Any
    stats: Any = field(init=False)
    """Kept here because vLLM drops its own reference after reporting them."""

    def __post_init__(self) -> None:
        self.stats = self.request.prefill_stats

    @property
    def computed(self) -> int:
        """The number of tokens in the KV cache."""
        return int(self.request.num_computed_tokens)

    @property
    def cached(self) -> int:
        """The number of tokens that the prefix cache had."""
        stats = self.stats
        return 0 if stats is None else int(stats.num_cached_tokens)


@dataclass(slots=True)
class Core:
    """A loaded model with its requests: a wrapper around vLLM's engine core."""

    core: Any
    adapters: dict[str, Any] = field(default_factory=dict[str, Any])
    """What names each adapter to vLLM."""
    steps: int = 0
    """The number of steps that computed something."""
    progress: dict[str, Progress] = field(default_factory=dict[str, Progress])

    @classmethod
    def load(cls, settings: Mapping[str, object], pooling: Pooling | None) -> "Core":
        """Loads with vLLM's engine arguments; with ``pooling``, for embeddings. Raises LoadError."""
        try:
            config = _arguments(settings, pooling).create_engine_config()
            with _temporary_files():
                return cls(engine_core.EngineCore(config, executor.Executor.get_class(config), log_stats=True))
        except BROKEN_MODEL as error:
            raise load_error(f"vLLM could not load {settings['model']}", error) from error

    def add_adapter(self, name: str, number: int, folder: Path) -> None:
        """Loads an adapter. Raises LoadError."""
        request = lora_request.LoRARequest(name, number, str(folder))
        try:
            self.core.add_lora(request)
            self.core.pin_lora(number)
        except BROKEN_MODEL as error:
            raise load_error(f"vLLM could not load the adapter {name} in {folder}", error) from error
        self.adapters[name] = request

    @property
    def config(self) -> Any:  # noqa: ANN401 -- it ships no types
        """The whole configuration, as vLLM has it."""
        return self.core.vllm_config

    @property
    def n_vocab(self) -> int:
        """The width of the logits."""
        return int(self.core.vllm_config.model_config.get_vocab_size())

    @property
    def dtype(self) -> str:
        """The type of computed elements."""
        return str(self.core.vllm_config.model_config.dtype).removeprefix("torch.")

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of running and of waiting requests."""
        running, waiting = self.core.scheduler.get_request_counts()
        return int(running), int(waiting)

    def add(self, sequence: VllmSequence) -> None:
        """Queues a sequence. The caller must end it; vLLM does so only when its context is full."""
        params = sampling_params.SamplingParams(
            temperature=0.0,
            max_tokens=max(1, sequence.n_limit - sequence.n_prefill) + 1,
            logprobs=sequence.logprobs,
            prompt_logprobs=sequence.prompt_logprobs,
            skip_reading_prefix_cache=None if sequence.cache_prompt else True,
            detokenize=False,
            extra_args={CHOICE: sequence.choice},
        )
        self._add(sequence.id, sequence.tokens, "sampling_params", params, sequence)

    def add_text(self, job: TextJob) -> None:
        """Queues a text to embed. The core must have been loaded with a pooling."""
        params = pooling_params.PoolingParams(task="embed")
        params.verify(self.core.vllm_config.model_config)
        self._add(job.id, job.tokens, "pooling_params", params)

    def _add(
        self,
        name: str,
        tokens: list[int],
        kind: Literal["sampling_params", "pooling_params"],
        params: object,
        sequence: VllmSequence | None = None,
    ) -> None:
        adapter, pictures = ("", []) if sequence is None else (sequence.adapter, sequence.pictures)
        asked = engine.EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(tokens),
            mm_features=list(pictures) or None,
            **{"sampling_params": None, "pooling_params": None, kind: params},
            arrival_time=time(),
            lora_request=self.adapters[adapter] if adapter else None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        request, wave = self.core.preprocess_add_request(asked)
        self.progress[name] = Progress(request)
        self.core.add_request(request, wave)

    def remove(self, request: str) -> None:
        """Ends a request, running or waiting."""
        if self.progress.pop(request, None) is not None:
            self.core.abort_requests([request])

    def discard(self, request: str) -> None:
        """Ends a request for which the model has computed NaN, and clears its blocks of the KV cache.

        The blocks would spoil their next user, because a masked cell still counts as 0 times its value. Raises
        RuntimeError if other processes hold the cache, which this one cannot clear.
        """
        manager = self.core.scheduler.kv_cache_manager
        blocks = {block for group in manager.get_block_ids(request) for block in group}
        manager.evict_blocks(blocks)
        alone = [block for block in blocks if manager.block_pool.blocks[block].ref_cnt == 1]
        self.remove(request)
        self._clear(alone)

    def clear_unused(self) -> None:
        """Clears the unused blocks of the KV cache, in which a text has left NaN. Raises as ``discard``."""
        self._clear(
            [block.block_id for block in self.core.scheduler.kv_cache_manager.block_pool.blocks if not block.ref_cnt]
        )

    def _clear(self, blocks: list[int]) -> None:
        driver = getattr(self.core.model_executor, "driver_worker", None)
        if driver is None:
            raise RuntimeError(
                "the model computed NaN, and its KV cache, which other processes hold, cannot be cleared"
            )
        driver.worker.model_runner._zero_block_ids(blocks)  # there is no public method

    def step(self) -> list[Output]:
        """Computes one step, and returns its results."""
        found, model_executed = self.core.step_fn()
        self.core.post_step(model_executed=model_executed)
        self.steps += bool(model_executed)
        batch = found.get(0) if found else None
        return [] if batch is None else [_output(each) for each in batch.outputs]


def follow(settings: Mapping[str, object], pooling: Pooling | None) -> None:
    """Computes this host's share of a model, whose engine core is on another host, with the same engine arguments.

    Returns when the workers of this host have ended.
    """
    config = _arguments(settings, pooling).create_engine_config(headless=True)
    followers = import_module("vllm.v1.executor.multiproc_executor").MultiprocExecutor(config, monitor_workers=False)
    followers.start_worker_monitor(inline=True)


def _arguments(settings: Mapping[str, object], pooling: Pooling | None) -> Any:  # noqa: ANN401 -- it ships no types
    if pooling is None:
        return arguments.EngineArgs(**settings, runner="generate")
    pooled = pooler.PoolerConfig(seq_pooling_type=pooling.upper())
    return arguments.EngineArgs(**settings, runner="pooling", pooler_config=pooled)


@contextmanager
def _temporary_files() -> Generator[None]:
    """Provides a temporary folder for the file by which processes find each other, which vLLM would not delete."""
    with TemporaryDirectory(prefix="exo-vllm-") as folder:
        usual, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield
        finally:
            tempfile.tempdir = usual


def open_tokenizer(folder: Path) -> HfTokenizer:
    """Opens a Hugging Face tokenizer. Raises LoadError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except BROKEN_MODEL as error:
        raise load_error(f"transformers could not load the tokenizer in {folder}", error) from error


def _output(found: _EngineOutput) -> Output:
    tokens, told = found.new_token_ids, found.new_prompt_logprobs_tensors
    scores = None if found.new_logprobs is None or not tokens else _scores(found.new_logprobs)[0]
    given_up = found.finish_reason in (engine.FinishReason.ERROR, engine.FinishReason.ABORT)
    return Output(
        id=found.request_id,
        token=tokens[0] if tokens else None,
        scores=scores,
        prompt_scores=None if told is None else _scores(told),
        vector=None if found.pooling_output is None else found.pooling_output.numpy().astype(np.float64),
        broken=given_up or found.num_nans_in_logits > 0 or (scores is not None and isnan(scores.chosen)),
    )


def _scores(found: _Logprobs) -> list[Scores]:
    ids: list[list[int]] = found.logprob_token_ids.tolist()
    logprobs: list[list[float]] = found.logprobs.tolist()
    return [
        Scores(own, sorted(zip(tokens[1:], others, strict=True), key=lambda each: (-each[1], each[0])))
        for tokens, (own, *others) in zip(ids, logprobs, strict=True)
    ]
