"""Facts about models for the lists and descriptions of all APIs, loaded or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from exo.cards.card import ModelCard
from exo.chat.output.registry import output_format
from exo.store.discover.description import Description
from exo.worker.protocol.events import Capabilities
from exo.worker.protocol.runners import RUNNERS
from exo.worker.supervisor.state_machine import ENDINGS

if TYPE_CHECKING:
    from exo.serving.app_state import Services

ModelState = Literal["loaded", "loading", "unloaded"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a client may want to know of a model. ``loaded`` comes from a runner, ``files`` from the model's files."""

    card: ModelCard
    state: ModelState
    on_disk: bool
    loaded: Capabilities | None
    files: Description | None
    slots: int = 0
    found_in: str | None = None
    """The program that keeps the model, if its card has no file."""

    @property
    def place(self) -> int:
        """The place in a list: model cards on disk, models that other programs keep, and those not on disk."""
        return 2 if not self.on_disk else 0 if self.found_in is None else 1

    @property
    def context_length(self) -> int | None:
        """The most tokens of one request, prompt and output together; None until a runner has decided it."""
        if self.loaded is not None:
            return self.loaded.context_length
        table = self.card.engines.get(next(iter(self.card.runners), ""), {})
        stated = table.get("n_ctx", table.get("max_model_len"))
        return stated if isinstance(stated, int) and not isinstance(stated, bool) else None

    @property
    def trained_length(self) -> int | None:
        """The tokens that the model was trained for, if known."""
        return self.card.context_length or (self.files.context_length if self.files is not None else 0) or None

    @property
    def template(self) -> str | None:
        """The chat template, if known."""
        if self.loaded is not None:
            return self.loaded.chat_template
        return self.files.chat_template if self.files is not None else None

    @property
    def _sees(self) -> bool:
        """Whether the model takes pictures; before it is loaded, whether its card says what that needs."""
        if self.loaded is not None:
            return self.loaded.vision
        runner = next(iter(self.card.runners), "")
        key = RUNNERS[runner].keys.get("vision") if runner else None
        return bool(key and self.card.engines.get(runner, {}).get(key))

    @property
    def capabilities(self) -> list[str]:
        """Ollama's names of the capabilities."""
        card = self.card
        form = output_format(self.template, card.tool_format, card.reasoning_dialect)
        thinks = "thinking" in (*card.capabilities, *(self.files.capabilities if self.files is not None else ()))
        has = {
            "completion": "TextGeneration" in card.tasks,
            "embedding": "TextEmbedding" in card.tasks,
            "tools": form.known and form.write_calls is not None,
            "thinking": thinks,
            "vision": self._sees,
        }
        return [word for word, there in has.items() if there]


async def model_facts(services: "Services", cards: Sequence[ModelCard]) -> list[ModelFacts]:
    """The facts about these models, in the same order. Looks at their files."""
    live = [each for each in services.pool.live() if each.state not in ENDINGS]
    files = await services.pulls.describe_all(cards)
    others = services.cards.known.found
    facts: list[ModelFacts] = []
    for card, (on_disk, described) in zip(cards, files, strict=True):
        own = [each for each in live if each.model_id == card.model_id]
        ready = [each.capabilities for each in own if each.capabilities is not None]
        state: ModelState = "loaded" if ready else "loading" if own else "unloaded"
        # A request may go to any of its runners.
        loaded = min(ready, key=lambda each: each.context_length, default=None)
        slots, keeper = sum(each.slots for each in own), others.get(card.model_id)
        found_in = keeper.program if keeper is not None else None
        facts.append(ModelFacts(card, state, on_disk or bool(own), loaded, described, slots, found_in))
    return facts
