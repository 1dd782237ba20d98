"""``/bench/chat/completions``: chat completions that are measured as upstream's benchmark expects."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import Field
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.body import read_body
from exo.api.http.openapi_schema import json_body
from exo.api.http.raw_route import DirectRoute
from exo.api.http.reply import ReplyChoice
from exo.api.http.response import GenerationResponse
from exo.api.openai.chat_request import ChatCompletionRequest
from exo.api.openai.response import ChatCompletion, ChatDialect
from exo.serving.app_state import Services
from exo.serving.generation import Generation
from exo.serving.request import GenerationRequest
from exo.worker.protocol.events import Usage
from exo.worker.supervisor.gpu_energy import GpuEnergy


class BenchChatRequest(ChatCompletionRequest):
    """A chat completion whose output has ``max_tokens`` tokens, and whose prompt is computed."""

    use_prefix_cache: bool = Field(default=False, description="Take what is cached of the prompt from the cache.")

    def request(self) -> GenerationRequest:
        """The request in no API's form."""
        return replace(super().request(), ignore_eos=True)


@final
class BenchDialect(ChatDialect):
    """The replies of chat completions with the speed of the prompt and of the output."""

    def __init__(self, reply_id: str, energy: GpuEnergy, used_memory: Callable[[], int]) -> None:
        """``used_memory`` returns the bytes that the model's runners use."""
        super().__init__(reply_id)
        self._energy, self._used_memory = energy, used_memory

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        """Adds speed and energy."""
        body = super().whole(choices, usage)  # sets the time of the first token
        return body[:-1] + b',"generation_stats":%b,"power_usage":%b}' % (self._stats(usage), to_json(self._power()))

    def end(self, usage: Usage) -> bytes:
        """Adds the speed in a comment."""
        return sse.comment(f"generation_stats {self._stats(usage).decode()}") + super().end(usage)

    def _stats(self, usage: Usage) -> bytes:
        """The first token belongs to the prompt's time."""
        timings = self._watch.timings(usage)
        seconds, computed = timings["predicted_ms"] / 1000, timings["prompt_n"]
        stats = {
            "prompt_tps": timings["prompt_per_second"],
            "generation_tps": round((usage.completion_tokens - 1) / seconds, 3) if seconds else 0.0,
            "prompt_tokens": usage.prompt_tokens,
            "generation_tokens": usage.completion_tokens,
            "peak_memory_usage": {"inBytes": self._used_memory()},
            "prefix_cache_hit": "none" if not usage.cached_tokens else "partial" if computed > 1 else "exact",
        }
        return to_json(stats)

    def _power(self) -> dict[str, float] | None:
        """The energy in joules and the mean power in watts of all GPUs; None if their driver counts no energy."""
        begun, now = self._watch.begun, time.monotonic_ns()
        first = self._watch.first or now
        prefill, generation = self._energy.joules(begun, first), self._energy.joules(first, now)
        if prefill is None or generation is None:
            return None
        return {
            "total_avg_sys_power_watts": (prefill + generation) / (now - begun) * 1e9,
            "total_energy_joules": prefill + generation,
            "prefill_energy_joules": prefill,
            "generation_energy_joules": generation,
        }


def bench_routes(services: Services) -> APIRouter:
    """The benchmark's chat completions."""
    routes = APIRouter(tags=["upstream exo"], route_class=DirectRoute)

    @routes.post("/bench/chat/completions", response_model=ChatCompletion, openapi_extra=json_body(BenchChatRequest))
    async def bench_chat_completions(request: Request) -> GenerationResponse:
        """Replies to a conversation and measures it."""
        body = await read_body(request, BenchChatRequest)
        model, reply_id, energy = services.routing.resolve(body.model), f"chatcmpl-{uuid4().hex}", GpuEnergy()
        there = [each.now for each in services.pool.reports() if each.now.model_id == model.card.model_id]
        if model.runner is None and len(placed := {each.runner for each in there if each.state != "Failed"}) == 1:
            model = replace(model, runner=placed.pop())  # the only instance is the one that is to be measured

        def used_memory() -> int:
            mine = (each.measured for each in services.pool.reports() if each.now.model_id == model.card.model_id)
            return sum(each.host + each.device for each in mine if each is not None)

        generation = Generation(services, model, body.request(), reply_id)
        dialect = BenchDialect(reply_id, energy, used_memory)
        return GenerationResponse(generation, dialect, stream=body.stream, during=energy.followed())

    return routes
