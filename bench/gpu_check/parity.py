"""The same float32 weights on the CPU and on the card: the project's own comparison of two engines."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
from pydantic import JsonValue

from bench.gpu_check.options import Options
from bench.gpu_check.record import CheckError, Step
from exo.compare import run
from exo.compare.comparison import Comparison
from exo.compare.engine import Engine
from exo.compare.run import Subject
from exo.worker.protocol.messages import Load
from exo.worker.supervisor.host_probe import probe_host
from exo.worker.supervisor.pool import runner_commands
from tests.conftest import fake_card
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.shape import ARCHITECTURES, Architecture

MAX_ABS = 0.05
"""Nats. A card multiplies float32 matrices of small batches with factors rounded to 10 bits (TF32). A logit of these
models, whose standard deviation is 4, is then off by a few thousandths; an error of arithmetic costs whole nats."""
KL_MEAN = 1e-4
TOP1 = 0.98


def steps(options: Options) -> list[Step]:
    """One for each architecture."""
    return [Step(f"parity {each}", "parity", partial(_compare, options, each), 20) for each in ARCHITECTURES]


def _compare(options: Options, architecture: Architecture, deadline: float) -> Mapping[str, Any]:
    path = options.work / "models" / f"twin-{architecture}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, Shape(architecture))
    exact: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "slots": 1}
    table: dict[str, JsonValue] = {"path": str(path), **exact}
    command = runner_commands()["cuda"]
    on_cpu = Load(model_id="test/twin", backend="LlamaCppCpu", table={**table, "threads": 1})
    checked = Load(model_id="test/twin", backend=options.backend, table={**table, "threads": 2})
    engines = Engine("CPU", tuple(command), on_cpu), Engine("checked", tuple(command), checked)

    async def compare() -> Comparison:
        with anyio.fail_after(deadline - time.monotonic()):
            host = await probe_host({})
            return await run.examine(Subject(fake_card(), host), engines, run.Options(), options.logs, lambda _: None)

    return judged(anyio.run(compare))


def judged(found: Comparison) -> Mapping[str, Any]:
    """What matters of a comparison. Raises CheckError where the two are further apart than rounding explains."""
    (pair,) = found.pairs
    divergence, greedy = pair.divergence, pair.greedy
    worst = max((each.margin for each in (*greedy.differences, *pair.seeded.differences)), default=0.0)
    facts = {
        "devices": [list(engine.devices) for engine in found.engines],
        "max_abs": divergence.max_abs,
        "mean_abs": divergence.mean_abs,
        "kl_mean": divergence.kl_mean,
        "top1_agreement": divergence.top1_agreement,
        "greedy": f"{greedy.identical} of {greedy.sequences} identical",
        "seeded": f"{pair.seeded.identical} of {pair.seeded.sequences} identical",
        "largest_margin_of_a_difference": worst,
    }
    if (
        divergence.max_abs > MAX_ABS
        or divergence.kl_mean > KL_MEAN
        or divergence.top1_agreement < TOP1
        or worst > 2 * MAX_ABS
    ):
        limits = f"max_abs {MAX_ABS}, kl_mean {KL_MEAN}, top1_agreement {TOP1}, margin {2 * MAX_ABS}"
        raise CheckError(f"further apart than rounding explains (bounds: {limits})", facts)
    return facts
