"""Ollama's information about models: the list, the details, and those that are loaded. Replies and routes."""

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, JsonValue

from exo import __version__
from exo.api.http.body import read_body
from exo.api.http.errors import ApiError
from exo.api.http.openapi_schema import json_body
from exo.api.ollama.request import OllamaShowRequest
from exo.api.ollama.response import OllamaReply, now
from exo.api.ollama.routes import LATEST
from exo.cards.card import ModelCard
from exo.chat.output.registry import output_format
from exo.serving.app_state import Services
from exo.store.discover.description import Description
from exo.worker.protocol.events import Capabilities
from exo.worker.supervisor.instance import InstanceReport

OLLAMA_VERSION = "0.13.5"
"""This version of Ollama's API. Clients refuse a server that is older than they need."""
CONTEXT_LENGTH = 4096
"""The reported context length if neither the model card nor a file states one."""
_MISSING = ("/pull", "/push", "/create", "/copy", "/delete", "/blobs/{digest}")
"""Paths of Ollama that are not offered."""
NEVER = "9999-12-31T23:59:59Z"
"""The expiry of a model that is not unloaded automatically."""


class OllamaDetails(OllamaReply):
    """Fields that the model card does not state are empty."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str = ""
    quantization_level: str

    @classmethod
    def of(cls, card: ModelCard) -> "OllamaDetails":
        """The details of a model card."""
        return cls(
            parent_model=card.base_model,
            format="gguf" if card.backends[0].startswith("LlamaCpp") else "safetensors",
            family=card.family,
            families=[card.family] if card.family else [],
            quantization_level=card.quantization,
        )


class OllamaModel(OllamaReply):
    """One model card. ``size`` is in bytes, ``digest`` the card's, ``modified_at`` the start of the server."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(OllamaReply):
    """The reply of ``/api/tags``."""

    models: list[OllamaModel]


class OllamaShown(OllamaReply):
    """The reply of ``/api/show``. ``template`` is Jinja; empty if the model is neither loaded nor on disk."""

    details: OllamaDetails
    model_info: dict[str, JsonValue]
    template: str
    capabilities: list[str]
    modified_at: str


class OllamaLoaded(OllamaReply):
    """A loaded model. ``size_vram`` is the size of its weights in bytes if its backend is not the CPU's."""

    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str = NEVER
    size_vram: int
    context_length: int


class OllamaLoadedModels(OllamaReply):
    """The reply of ``/api/ps``."""

    models: list[OllamaLoaded]


class OllamaVersion(OllamaReply):
    """The reply of ``/api/version``."""

    version: str = Field(default=OLLAMA_VERSION, description="The version of Ollama's API.")
    exo: str = Field(default=__version__, description="This server's own version.")


def digest(card: ModelCard) -> str:
    """Identifies the content of the card."""
    return sha256(json.dumps(card.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def listed(name: str, card: ModelCard, started: str) -> OllamaModel:
    """A card in the list, under its model id or an alias."""
    return OllamaModel(
        name=name,
        model=name,
        modified_at=started,
        size=card.storage_size.in_bytes,
        digest=digest(card),
        details=OllamaDetails.of(card),
    )


def shown(card: ModelCard, loaded: Capabilities | None, files: Description | None, started: str) -> OllamaShown:
    """The details of a card. ``loaded`` comes from a runner with the model, ``files`` from the model's files."""
    template = loaded.chat_template if loaded is not None else files.chat_template if files is not None else None
    known = [card.context_length, files.context_length if files else 0, loaded.context_length if loaded else 0]
    context_length = next(filter(None, known), CONTEXT_LENGTH)
    thinks = "thinking" in (*card.capabilities, *(files.capabilities if files is not None else ()))
    return OllamaShown(
        details=OllamaDetails.of(card),
        model_info=_info(card, card.family or (files.architecture if files else "") or "model", context_length),
        template=template or "",
        capabilities=_capabilities(card, template, thinks=thinks, sees=loaded is not None and loaded.vision),
        modified_at=started,
    )


def running(card: ModelCard, report: InstanceReport) -> OllamaLoaded | None:
    """A model in memory; None if it is still loading."""
    model = report.now.capabilities
    if model is None or report.pid is None:
        return None
    return OllamaLoaded(
        name=card.model_id,
        model=card.model_id,
        size=model.model_bytes,
        digest=digest(card),
        details=OllamaDetails.of(card),
        expires_at=NEVER if report.time_left is None else _in_future(report.time_left),
        size_vram=0 if report.backend.endswith("Cpu") else model.model_bytes,
        context_length=model.context_length,
    )


def _in_future(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def _info(card: ModelCard, architecture: str, context_length: int) -> dict[str, JsonValue]:
    """The card under Ollama's names. Sizes have the architecture as a prefix."""
    sizes: dict[str, JsonValue] = {
        "block_count": card.n_layers,
        "embedding_length": card.hidden_size,
        "context_length": context_length,
        "attention.head_count_kv": card.num_key_value_heads,
    }
    known = {f"{architecture}.{name}": value for name, value in sizes.items() if value is not None}
    return {"general.architecture": architecture, **known}


def _capabilities(card: ModelCard, template: str | None, *, thinks: bool, sees: bool) -> list[str]:
    """Ollama's names of the capabilities."""
    form = output_format(template, card.tool_format, card.reasoning_dialect)
    has = {
        "completion": "TextGeneration" in card.tasks,
        "embedding": "TextEmbedding" in card.tasks,
        "tools": form.known and form.write_calls is not None,
        "thinking": thinks,
        "vision": sees,
    }
    return [word for word, there in has.items() if there]


def model_routes(services: Services) -> APIRouter:
    """Models, and errors for the operations of Ollama that are not offered."""
    routes = APIRouter(prefix="/api", tags=["Ollama"])
    started = now()

    @routes.get("/tags")
    async def tags() -> OllamaModels:
        """Every model card, once under its id and once under each alias."""
        catalogue = services.cards.known
        named = {name: card for name in (*catalogue.cards, *catalogue.aliases) if (card := catalogue.get(name))}
        return OllamaModels(models=[listed(name, card, started) for name, card in named.items()])

    @routes.post("/show", response_model=OllamaShown, openapi_extra=json_body(OllamaShowRequest))
    async def show(request: Request) -> OllamaShown:
        """The details of a model."""
        body = await read_body(request, OllamaShowRequest)
        card = services.routing.resolve(body.model or body.name, LATEST).card
        live = [each.capabilities for each in services.pool.live() if each.model_id == card.model_id]
        return shown(card, next(filter(None, live), None), await services.pulls.describe(card), started)

    @routes.get("/ps")
    async def ps() -> OllamaLoadedModels:
        """The models that are loaded."""
        cards = services.cards.known.cards
        reports = services.pool.reports()
        found = [running(cards.get(report.now.model_id, report.card), report) for report in reports]
        return OllamaLoadedModels(models=[each for each in found if each is not None])

    @routes.get("/version")
    async def version() -> OllamaVersion:
        """The version of Ollama's API and that of exo."""
        return OllamaVersion()

    async def missing(request: Request) -> Response:
        message = (
            f"{request.url.path} is not offered: the models are those that have a card; exo pull fetches their files"
        )
        raise ApiError(501, message, code="not_implemented")

    for path in _MISSING:
        routes.add_api_route(path, missing, methods=["GET", "POST", "DELETE"], include_in_schema=False)
    return routes
