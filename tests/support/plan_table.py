"""How exo would load the built-in models with llama.cpp on GPUs of different sizes, with no GPU and no model here.

``python -m tests.support.plan_table`` writes the table in ``docs/plans.md``.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pydantic import JsonValue

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import RAM, Estimated
from exo.worker.runner_cuda.loading.devices import Gpu
from exo.worker.runner_cuda.loading.estimate import plans
from exo.worker.runner_cuda.loading.inputs import LoadInputs
from exo.worker.runner_cuda.loading.kv_layout import pool_obstacle
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.loading.placement import chosen
from exo.worker.supervisor.dry_run import decided
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.placement_plan import PlacementPlan
from tests import ROOT
from tests.support.model_shapes import SHAPES, header, projector

GIB = 1 << 30
PAGE = ROOT / "docs" / "plans.md"
HOST = 64 * GIB
GPUS: dict[str, tuple[int, ...]] = {
    "8 GiB": (8,), "12 GiB": (12,), "16 GiB": (16,), "24 GiB": (24,), "2 x 24 GiB": (24, 24), "80 GiB": (80,),
}  # fmt: skip
"""GiB of each GPU, all of which are free."""
PREFIXES = GIB
_BEGIN, _END = "<!-- table -->", "<!-- end of the table -->"


class _Free(Gpu):
    """A CUDA device that is not here. Its handle is its memory in bytes, all of which is free."""

    def memory(self) -> tuple[int, int]:
        return self.handle, self.handle


def cards() -> list[ModelCard]:
    """The built-in cards, in the order of the table."""
    found = (card for name in SHAPES if (card := Catalogue.load().get(name)) is not None)
    return sorted(found, key=lambda card: (card.storage_size.in_bytes, card.model_id))


def capacity(gpus: Sequence[int]) -> Memory:
    return Memory(HOST, {f"CUDA{at}": size * GIB for at, size in enumerate(gpus)})


def estimated(card: ModelCard, gpus: Sequence[int], **table: JsonValue) -> Estimated:
    """The runner's answer with these GPUs, and with these settings in the card."""
    # By default the size of the prefix cache depends on the RAM of the machine that this runs on.
    given = {**card.engines["cuda"], "prefix_cache_bytes": PREFIXES, **table}
    load = Load(model_id=card.model_id, backend="LlamaCppCuda", table=given, tasks=card.tasks)
    options = CudaOptions.model_validate(given)
    present = tuple(
        _Free(f"CUDA{at}", size * GIB, splits_rows=False, copies_weights=True) for at, size in enumerate(gpus)
    )
    model = header(card.model_id)
    poolable = pool_obstacle(options, model) is None
    devices = chosen(options, load.backend, present)
    seeing = projector(card.model_id) if options.mmproj is not None else None
    inputs = LoadInputs(options, present, devices, Path(), [model], ())
    return plans(load, inputs, None, seeing, poolable=poolable)


@cache
def plan(model_id: str, gpus: tuple[int, ...]) -> PlacementPlan:
    card = Catalogue.load().get(model_id)
    assert card is not None
    return decided(model_id, "cuda", estimated(card, gpus), capacity(gpus))


def table() -> str:
    rows = [["model", "file", *GPUS], ["---", "---:", *["---" for _ in GPUS]]]
    for card in cards():
        size = f"{card.storage_size.in_bytes / 1e9:.1f} GB"
        rows.append(
            [card.model_id.partition("/")[2], size, *(_cell(plan(card.model_id, gpus)) for gpus in GPUS.values())]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(found: PlacementPlan) -> str:
    if found.problem is not None:
        return "no"
    joined = "share" if found.kv == "pool" else "x"
    text = f"{found.slots} {joined} {found.context_length:,}"
    if found.settings.get("mmproj_offload") is False:
        text += "; projector in RAM"
    if found.experts_in_ram:
        text += f"; experts of {found.experts_in_ram} layers in RAM"
    if in_ram := found.layers.get(RAM, 0):
        text += f"; {in_ram} of {sum(found.layers.values())} layers in RAM"
    return text + ("; on both" if len([name for name in found.layers if name != RAM]) > 1 else "")


def page(before: str) -> str:
    """The page with the table as it is now."""
    start, _, rest = before.partition(_BEGIN)
    return f"{start}{_BEGIN}\n{table()}{_END}{rest.partition(_END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
