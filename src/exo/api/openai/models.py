"""The list of models: what OpenAI's clients read, and what others add to it."""

import time
from typing import Literal

from fastapi import APIRouter, Path, Query
from pydantic import Field

from exo.api.openai.response import Reply, absent
from exo.serving.app_state import Services
from exo.serving.model_facts import ModelFacts, ModelState, model_facts

_GENERATION = (
    "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens", "min_p", "n",
    "presence_penalty", "repetition_penalty", "response_format", "seed", "stop", "stream", "structured_outputs",
    "temperature", "top_k", "top_logprobs", "top_p",
)  # fmt: skip
_TOOLS = ("parallel_tool_calls", "tool_choice", "tools")
_REASONING = ("reasoning", "reasoning_effort")
_EMBEDDING = ("dimensions", "encoding_format")


class ModelStatus(Reply):
    """llama-server's form of the state."""

    value: ModelState


class ModelMeta(Reply):
    """llama-server's names of sizes in tokens and bytes."""

    n_ctx: int | None = Field(default=None, exclude_if=absent)
    n_ctx_train: int | None = Field(default=None, exclude_if=absent)
    n_vocab: int | None = Field(default=None, exclude_if=absent)
    size: int


class ModelArchitecture(Reply):
    """The kinds of input and output, as OpenRouter names them."""

    input_modalities: list[Literal["text", "image"]]
    output_modalities: tuple[Literal["text"]] = ("text",)


class ListedModel(Reply):
    """One available model. The context length is that of a request; it is absent until a runner has decided it."""

    id: str
    parent: str | None = Field(default=None, exclude_if=absent)
    """The model that an adapter changes."""
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    name: str
    """The last part of the id. This and the next field are upstream exo's."""
    hugging_face_id: str
    aliases: list[str]
    downloaded: bool
    """Whether its files are on disk."""
    found_in: str | None = Field(default=None, exclude_if=absent)
    """The program that keeps the model, if it has no model card of its own."""
    status: ModelStatus
    context_length: int | None = Field(default=None, exclude_if=absent)
    max_model_len: int | None = Field(default=None, exclude_if=absent)
    meta: ModelMeta
    storage_size_megabytes: int
    """Upstream exo's form of ``meta.size``."""
    capabilities: list[str]
    architecture: ModelArchitecture
    supported_parameters: list[str]

    @classmethod
    def of(cls, facts: ModelFacts, created: int, adapter: str = "") -> "ListedModel":
        """The form of the API, of a model or of one of its adapters. ``created`` is in seconds since 1970."""
        card, length, loaded = facts.card, facts.context_length, facts.loaded
        capabilities = [each for each in facts.capabilities if not (adapter and each == "embedding")]
        parameters = [*_GENERATION] if "completion" in capabilities else []
        parameters += [
            *(_TOOLS if "tools" in capabilities else ()),
            *(_REASONING if "thinking" in capabilities else ()),
        ]
        parameters += _EMBEDDING if "embedding" in capabilities else ()
        name = f"{card.model_id}:{adapter}" if adapter else card.model_id
        n_bytes = loaded.model_bytes if loaded is not None else card.storage_size.in_bytes
        return cls(
            id=name,
            name=name.rpartition("/")[2],
            hugging_face_id=name,
            parent=card.model_id if adapter else None,
            created=created,
            owned_by=card.model_id.partition("/")[0],
            aliases=[f"{alias}:{adapter}" if adapter else alias for alias in card.aliases],
            downloaded=facts.on_disk,
            found_in=facts.found_in,
            status=ModelStatus(value=facts.state),
            context_length=length,
            max_model_len=length,
            meta=ModelMeta(
                n_ctx=length,
                n_ctx_train=facts.trained_length,
                n_vocab=loaded.vocabulary if loaded is not None else None,
                size=n_bytes,
            ),
            storage_size_megabytes=n_bytes >> 20,
            capabilities=capabilities,
            architecture=ModelArchitecture(
                input_modalities=["text", "image"] if "vision" in capabilities else ["text"]
            ),
            supported_parameters=sorted(parameters),
        )


class ModelList(Reply):
    """The reply of ``/v1/models``, the models on disk first."""

    object: Literal["list"] = "list"
    data: list[ListedModel]


def model_list_routes(services: Services) -> APIRouter:
    """The list of models, and each of them."""
    routes = APIRouter(prefix="/v1/models", tags=["OpenAI"])
    started = int(time.time())

    @routes.get("")
    async def list_models(
        status: Literal["downloaded", "loaded"] | None = Query(default=None, description="Only these models."),
    ) -> ModelList:
        """Every model that has a card or that another program keeps here, those on disk first, and its adapters."""
        found = await model_facts(services, list(services.cards.known.cards.values()))
        chosen = [
            each
            for each in sorted(found, key=lambda each: each.place)
            if status is None or (each.on_disk if status == "downloaded" else each.state == "loaded")
        ]
        cards = services.cards.known.cards
        return ModelList(
            data=[
                ListedModel.of(each, started, name)
                for each in chosen
                for name in ("", *each.card.adapters)
                if not name or f"{each.card.model_id}:{name}" not in cards
            ]
        )

    @routes.get("/{name:path}")
    async def get_model(
        name: str = Path(description='A model id or alias, with an optional ":adapter".'),
    ) -> ListedModel:
        """One model, by id or alias, or one of its adapters."""
        requested = services.routing.resolve(name)
        (facts,) = await model_facts(services, [requested.card])
        return ListedModel.of(facts, started, requested.adapter)

    return routes
