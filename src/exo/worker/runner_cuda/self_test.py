"""``--self-test``: whether a GPU really computes, shown on a tiny model in about two seconds for each GPU.

The model has random weights in Q8_0, which exercises the kernels of quantised models. Its layers must all be on the
GPU, by llama.cpp's own account, and the logits of a prompt and of single tokens after it must be the CPU's.
"""

import json
import re
import struct
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import Context, EngineError, Logits, Rows
from exo.worker.runner_cuda.loading.devices import CUDA, VULKAN, Gpu, gpus
from exo.worker.runner_cuda.loading.llama_log import Log
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions

BOUNDS = {CUDA: 0.05, VULKAN: 0.5}
"""Nats by which log-probabilities may differ from the CPU's: the kernels round and add in another order. CPU and CUDA
round the activations to 8 bits, some Vulkan devices do not, which makes 0.17 here. A wrong kernel is off by several."""
ON_DEVICE = 0.95
LAYERS, WIDTH, HEADS, VOCABULARY = 2, 256, 4, 512
PROMPT, SINGLE = 48, 4
"""Tokens computed at once, and one by one after them."""
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_F32, _Q8_0 = 0, 8
"""Numbers of types, of GGUF's metadata and of ggml's tensors."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of one GPU. ``seconds`` include the driver's compilation at the first use of a plug-in."""

    device: str
    on_device: float
    """The share of the layers' bytes in its buffers, by llama.cpp's account."""
    difference: float | None
    """The largest one between log-probabilities of GPU and CPU, in nats; None if the GPU gave none."""
    seconds: float
    failure: str
    """Why this is no proof; empty if it is one."""
    bound: float


class _PlacementLog(Log):
    """Keeps llama.cpp's account of the buffers that hold a model."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        super().__init__()

    def _receive(self, level: int, text: bytes, _: object) -> None:
        if found := re.search(rb"(\S+) model buffer size = +([0-9.]+) MiB", text):
            self.mib[found[1].decode()] = float(found[2])
        super()._receive(level, text, _)


def main(backend: str) -> str:
    """The answer: JSON, a list with one ``Proof`` for each GPU. Ends the program without a usable plug-in."""
    try:
        return json.dumps([asdict(each) for each in prove(gpus(backend), BOUNDS[backend])])
    except LoadError as error:
        sys.exit(str(error))


def prove(devices: Sequence[Gpu], bound: float) -> list[Proof]:
    """Tries each device by itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "self-test.gguf"
        layers = write_model(path) / (1 << 20)
        expected, _ = _log_probabilities(path, ())
        return [_prove(path, each, expected, layers, bound) for each in devices]


def _prove(path: Path, device: Gpu, expected: Logits, layers: float, bound: float) -> Proof:
    began, share, difference, failure = time.monotonic(), 0.0, None, ""
    try:
        found, mib = _log_probabilities(path, (device,))
        share = sum(size for name, size in mib.items() if f"{name}_".startswith(f"{device.buffers}_")) / layers
        difference = float(np.abs(found - expected).max())
        if share < ON_DEVICE:
            failure = f"only {share:.0%} of the layers' bytes are on it; llama.cpp has put them on {', '.join(mib)}"
        elif not difference <= bound:
            failure = f"log-probabilities differ from the CPU's by {difference:.3g} nats, more than {bound}"
    except (LoadError, EngineError) as error:
        failure = str(error)
    return Proof(device.name, share, difference, time.monotonic() - began, failure, bound)


def _log_probabilities(path: Path, devices: Sequence[Gpu]) -> tuple[Logits, Mapping[str, float]]:
    """Returns the log-probabilities of all rows, and the MiB of the model in each buffer.

    Raises LoadError and EngineError.
    """
    log, options = _PlacementLog(), CudaOptions(path=str(path), n_ctx=256, slots=1, threads=1)
    model = Model(path, options, devices, lambda _: None, log)
    context = Context(model, options, 256, Rows(step=PROMPT, graph=PROMPT, outputs=PROMPT), log)
    rows: list[Logits] = []
    for start, count in ((0, PROMPT), *((PROMPT + at, 1) for at in range(SINGLE))):
        batch, positions = context.batch, np.arange(start, start + count)
        batch.tokens[:count] = positions * 7 % VOCABULARY
        batch.positions[:count] = positions
        batch.slots[:count], batch.outputs[:count] = 0, 1
        context.decode(count)
        rows.append(context.logits(count).copy())
    context.free()
    model.free()
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32), log.mib


def write_model(path: Path) -> int:
    """Writes a small Llama with random weights and no tokenizer as a GGUF. Returns the bytes of its layers."""
    random, tensors = np.random.default_rng(1), dict[str, tuple[tuple[int, ...], int, bytes]]()

    def matrix(name: str, columns: int, rows: int) -> None:
        blocks = np.zeros(columns * rows // 32, np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
        blocks["scale"] = 1 / (60 * columns**0.5)
        blocks["values"] = random.integers(-127, 128, (len(blocks), 32))
        tensors[f"{name}.weight"] = (columns, rows), _Q8_0, blocks.tobytes()

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = (WIDTH,), _F32, np.ones(WIDTH, "<f4").tobytes()

    matrix("token_embd", WIDTH, VOCABULARY)
    for block in (f"blk.{layer}" for layer in range(LAYERS)):
        norm(f"{block}.attn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{block}.{part}", WIDTH, WIDTH)
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.ffn_gate", WIDTH, 2 * WIDTH)
        matrix(f"{block}.ffn_up", WIDTH, 2 * WIDTH)
        matrix(f"{block}.ffn_down", 2 * WIDTH, WIDTH)
    norm("output_norm")
    matrix("output", WIDTH, VOCABULARY)
    sizes = {
        "context_length": 256,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": 2 * WIDTH,
        "attention.head_count": HEADS,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": VOCABULARY,
    }
    metadata = [_pair("general.architecture", _STRING, _text("llama"))]
    metadata += [_pair(f"llama.{key}", _UINT32, struct.pack("<I", value)) for key, value in sizes.items()]
    metadata.append(_pair("llama.attention.layer_norm_rms_epsilon", _FLOAT32, struct.pack("<f", 1e-5)))
    metadata.append(_pair("tokenizer.ggml.model", _STRING, _text("no_vocab")))
    header, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata), bytearray()
    for name, (shape, kind, values) in tensors.items():
        header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += values + bytes(-len(values) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return sum(len(values) for name, (_, _, values) in tensors.items() if name != "token_embd.weight")


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pair(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value
