"""How a model is loaded, or would be, and what limits it: in numbers for programs and in words for the user."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, JsonValue

from exo.worker.protocol.events import RAM, Estimated, Layout, LoadOption
from exo.worker.supervisor.memory.memory import HOST, Memory

if TYPE_CHECKING:  # exo ps has no use for it
    from exo.worker.supervisor.memory.budget import MemoryBudget


class PlacementPlan(BaseModel):
    """How a runner loads a model. Lengths are in tokens, sizes in bytes; 0 and "" where the runner does not say."""

    model_config = ConfigDict(frozen=True)

    context_length: int = 0
    """The most tokens of one request, prompt and output together."""
    trained_length: int = 0
    slots: int = 0
    kv: str = ""
    """Whether the slots share one KV cache of ``context_length`` tokens ("pool"), or each has one ("split")."""
    kv_type: str = ""
    """The number format of the KV cache."""
    layers: Mapping[str, int] = {}
    """The number of layers in each place, "RAM" or a device. The output counts as one."""
    experts_in_ram: int = 0
    """The number of layers on a device whose experts are in RAM."""
    batch: int = 0
    """The most prompt tokens of a step."""
    settings: Mapping[str, JsonValue] = {}
    """Values for the keys that the model card leaves to exo, such as ``n_ctx``."""
    memory: Mapping[str, int] = {}
    """By place: "memory" is RAM, the others are devices."""
    limit: str = ""
    """Why the context is not longer."""
    kv_reason: str = ""
    """Why the slots share a KV cache."""
    problem: str | None = None
    """Why the model cannot be loaded."""
    notes: tuple[str, ...] = ()
    """Notes about the model's files, such as a fault that makes the output worse."""

    @property
    def cache(self) -> str:
        """The layout of the KV cache in words."""
        if self.kv == "pool":
            return f"pool of {self.context_length:,} tokens for {self.slots} slots"
        return f"{self.slots} of {self.context_length:,} tokens"

    @classmethod
    def of(cls, estimated: Estimated, option: LoadOption, budget: "MemoryBudget", room: Memory | None) -> Self:
        """The plan for an option that was chosen where ``room`` was free; None where memory is not counted."""
        memory = budget.need(option).by_account()
        plan = cls(settings=option.settings, memory=memory, notes=estimated.notes, trained_length=estimated.trained)
        if (layout := option.layout) is None:
            return plan
        limit = _limit(estimated, option, layout.context_length, budget, room)
        reason = _kv_reason(estimated, option, layout, budget, room) if layout.kv == "pool" else ""
        return plan.model_copy(update={**dict(layout), "limit": limit, "kv_reason": reason})


def layers_in_words(layers: Mapping[str, int], experts_in_ram: int) -> str:
    """Where a model's layers are, such as "20 in RAM, 29 on CUDA0"; see ``Layout``."""
    places = ", ".join(f"{count} {'in' if place == RAM else 'on'} {place}" for place, count in layers.items())
    return f"{places}; the experts of {experts_in_ram} of them in RAM" if experts_in_ram else places


def _limit(
    estimated: Estimated, option: LoadOption, context_length: int, budget: "MemoryBudget", room: Memory | None
) -> str:
    if estimated.trained and context_length >= estimated.trained:
        return "the trained length"
    if not any(key in option.settings for key in ("n_ctx", "max_model_len")):
        return "set by the model card"
    before = estimated.choices[: estimated.choices.index(option)]
    longer = [each for each in before if each.layout is not None and each.layout.context_length > context_length]
    if not longer or room is None:
        return estimated.longest_because
    short = [name for name, _, _ in budget.need(longer[-1]).beyond(room)]
    full = " and ".join("the memory" if name == HOST else name for name in short)
    reason = f"{full} {'are' if len(short) > 1 else 'is'} full" if short else estimated.longest_because
    return "; ".join(filter(None, (reason, _with_smaller_cache(estimated.longer, context_length, budget, room))))


def _kv_reason(
    estimated: Estimated, option: LoadOption, layout: Layout, budget: "MemoryBudget", room: Memory | None
) -> str:
    """Why the slots share a pool, and what they would have otherwise."""
    if "kv" not in option.settings:
        return "set by the model card"
    split = [each for each in estimated.choices if each.layout is not None and each.layout.kv == "split"]
    least = min((each.layout.slots for each in split if each.layout is not None), default=layout.slots)
    reason = f"{least} slots of {layout.context_length:,} tokens do not fit"
    for each in split:
        if each.layout is not None and room is not None and budget.need(each).fits(room):
            return f'{reason}; with kv "split" {each.layout.slots} of {each.layout.context_length:,} would'
    return reason


def _with_smaller_cache(longer: Sequence[LoadOption], context_length: int, budget: "MemoryBudget", room: Memory) -> str:
    for each in longer:
        if each.layout is not None and each.layout.context_length > context_length and budget.need(each).fits(room):
            return f'with "{each.layout.kv_type}" for cache_type_k and cache_type_v {each.layout.context_length:,}'
    return ""
