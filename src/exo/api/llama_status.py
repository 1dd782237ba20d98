"""llama-server's endpoints that tell what a server is and does: properties and slots."""

from fastapi import APIRouter, Query
from pydantic import BaseModel

from exo import __version__
from exo.api.http.errors import ApiError
from exo.serving.app_state import Services
from exo.serving.model_facts import model_facts

_MODEL = Query(default="", max_length=300, description="A model id or alias; optional if one is loaded or known.")


class GenerationSettings(BaseModel):
    """The context of one request, in tokens; 0 until a runner has decided it."""

    n_ctx: int


class Modalities(BaseModel):
    """The kinds of input besides text."""

    vision: bool
    audio: bool = False


class ModelProperties(BaseModel):
    """The reply of ``/props``."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    chat_template: str
    bos_token: str
    eos_token: str
    modalities: Modalities
    build_info: str


class SlotState(BaseModel):
    """One slot of a loaded model."""

    id: int
    n_ctx: int
    is_processing: bool
    model: str


class LoraAdapter(BaseModel):
    """An adapter, by its number and its name in the model card. ``scale`` is that without a request's ``lora``."""

    id: int
    name: str
    scale: float = 0.0


def llama_status_routes(services: Services) -> APIRouter:
    """Properties and slots."""
    routes = APIRouter(tags=["llama-server"])

    @routes.get("/props")
    async def props(model: str = _MODEL) -> ModelProperties:
        """The properties of a model. Does not load it."""
        (facts,) = await model_facts(services, [services.routing.resolve(model).card])
        loaded = facts.loaded
        return ModelProperties(
            default_generation_settings=GenerationSettings(n_ctx=facts.context_length or 0),
            total_slots=facts.slots,
            model_alias=facts.card.model_id,
            chat_template=facts.template or "",
            bos_token=loaded.bos_token if loaded is not None else "",
            eos_token=loaded.eos_token if loaded is not None else "",
            modalities=Modalities(vision="vision" in facts.capabilities),
            build_info=f"exo-{__version__}" + (f" {loaded.engine}-{loaded.engine_version}" if loaded else ""),
        )

    @routes.get("/slots")
    async def slots(model: str = _MODEL) -> list[SlotState]:
        """The slots of all loaded models, or of one."""
        only = services.routing.resolve(model).card.model_id if model else None
        return [
            SlotState(
                id=number,
                n_ctx=each.capabilities.context_length,
                is_processing=number < each.active,
                model=each.model_id,
            )
            for each in services.pool.live()
            if each.capabilities is not None and only in (None, each.model_id)
            for number in range(each.slots)
        ]

    @routes.post("/slots/{slot}", include_in_schema=False)
    async def slot_action(slot: str) -> None:
        raise ApiError(
            501,
            f"slot {slot} cannot be saved, restored or erased by a request: exo keeps computed prompts by itself,"
            " in RAM and on disk, and finds them again; prefix_cache_bytes and prefix_disk_bytes in the model card"
            " bound them",
            code="not_implemented",
        )

    @routes.get("/lora-adapters")
    async def lora_adapters(model: str = _MODEL) -> list[LoraAdapter]:
        """The adapters of a model. A request uses none unless it names it."""
        adapters = services.routing.resolve(model).card.adapters
        return [LoraAdapter(id=number, name=name) for number, name in enumerate(adapters)]

    @routes.post("/lora-adapters", include_in_schema=False)
    async def set_lora_adapters() -> None:
        message = "scales are not set for all requests: each states them in its field lora, or the model card does"
        raise ApiError(501, message, code="not_implemented")

    return routes
