"""Ollama's information about models: the list, the details, and those that are loaded. Replies and routes."""

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, JsonValue

from exo import __version__
from exo.api.http.body import read_body
from exo.api.http.errors import ApiError
from exo.api.http.openapi_schema import json_body
from exo.api.ollama.request import LATEST, OllamaPullRequest, OllamaShowRequest
from exo.api.ollama.response import OllamaDialect, OllamaReply, now
from exo.cards.card import ModelCard
from exo.serving.app_state import Services
from exo.serving.model_facts import ModelFacts, model_facts
from exo.worker.supervisor.instance import InstanceReport

OLLAMA_VERSION = "0.13.5"
"""This version of Ollama's API. Clients refuse a server that is older than they need."""
CONTEXT_LENGTH = 4096
"""The reported context length if neither the model card nor a file states one."""
_MISSING = ("/push", "/create", "/copy", "/delete", "/blobs/{digest}")
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
    downloaded: bool
    """Whether its files are on disk."""
    found_in: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """The program that keeps the model, if it has no model card of its own."""


class OllamaModels(OllamaReply):
    """The reply of ``/api/tags``, the models on disk first."""

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


class OllamaPulled(OllamaReply):
    """The reply of ``/api/pull``."""

    status: Literal["success"] = "success"


class OllamaVersion(OllamaReply):
    """The reply of ``/api/version``."""

    version: str = Field(default=OLLAMA_VERSION, description="The version of Ollama's API.")
    exo: str = Field(default=__version__, description="This server's own version.")


def digest(card: ModelCard) -> str:
    """Identifies the content of the card."""
    return sha256(json.dumps(card.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def listed(name: str, facts: ModelFacts, started: str, adapter: str = "") -> OllamaModel:
    """A model in the list, under its model id or an alias, or one of its adapters."""
    card = facts.card
    details = OllamaDetails.of(card)
    if adapter:
        name, details = f"{name}:{adapter}", details.model_copy(update={"parent_model": card.model_id})
    return OllamaModel(
        name=name,
        model=name,
        modified_at=started,
        size=card.storage_size.in_bytes,
        digest=digest(card),
        details=details,
        downloaded=facts.on_disk,
        found_in=facts.found_in,
    )


def shown(facts: ModelFacts, started: str) -> OllamaShown:
    """The details of a model. Until it is loaded, its context may be shorter than told here."""
    card, files = facts.card, facts.files
    context_length = facts.context_length or facts.trained_length or CONTEXT_LENGTH
    return OllamaShown(
        details=OllamaDetails.of(card),
        model_info=_info(card, card.family or (files.architecture if files else "") or "model", context_length),
        template=facts.template or "",
        capabilities=facts.capabilities,
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


def model_routes(services: Services) -> APIRouter:
    """Models, and errors for the operations of Ollama that are not offered."""
    routes = APIRouter(prefix="/api", tags=["Ollama"])
    started = now()

    @routes.get("/tags")
    async def tags() -> OllamaModels:
        """Every model and adapter, once under the model's id and once under each alias; those on disk first."""
        catalogue = services.cards.known
        named = {name: card for name in (*catalogue.cards, *catalogue.aliases) if (card := catalogue.get(name))}
        facts = await model_facts(services, list(named.values()))
        found = sorted(zip(named, facts, strict=True), key=lambda each: each[1].place)
        return OllamaModels(
            models=[
                listed(name, each, started, adapter)
                for name, each in found
                for adapter in ("", *each.card.adapters)
                if not adapter or f"{name}:{adapter}" not in named
            ]
        )

    @routes.post("/show", response_model=OllamaShown, openapi_extra=json_body(OllamaShowRequest))
    async def show(request: Request) -> OllamaShown:
        """The details of a model."""
        body = await read_body(request, OllamaShowRequest)
        card = services.routing.resolve(body.model or body.name, LATEST).card
        (facts,) = await model_facts(services, [card])
        return shown(facts, started)

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

    @routes.post("/pull", response_model=OllamaPulled, openapi_extra=json_body(OllamaPullRequest))
    async def pull(request: Request) -> Response:
        """Confirms that a model is on disk. Others are refused: ``/v1/models/pull`` downloads them."""
        body = await read_body(request, OllamaPullRequest)
        card = services.routing.resolve(body.model or body.name, LATEST).card
        (facts,) = await model_facts(services, [card])
        if not facts.on_disk:
            message = f"{card.model_id} is not on disk; exo pull {card.model_id} or /v1/models/pull downloads it"
            raise ApiError(501, message, code="not_implemented")
        done = OllamaPulled().model_dump_json().encode()
        media_type = OllamaDialect.media_type if body.stream else "application/json"
        return Response(done + b"\n" if body.stream else done, media_type=media_type)

    async def missing(request: Request) -> Response:
        message = (
            f"{request.url.path} is not offered: the models are those that have a card; exo pull fetches their files"
        )
        raise ApiError(501, message, code="not_implemented")

    for path in _MISSING:
        routes.add_api_route(path, missing, methods=["GET", "POST", "DELETE"], include_in_schema=False)
    return routes
