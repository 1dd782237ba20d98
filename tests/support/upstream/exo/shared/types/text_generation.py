from typing import Any

from pydantic import BaseModel


class InputMessage(BaseModel):
    role: str
    content: str


class TextGenerationTaskParams(BaseModel):
    model: str = "me/model"
    input: list[InputMessage] = []
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    bench: bool = False
    use_prefix_cache: bool = False
    top_k: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    chat_template_messages: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    images: list[str] = []


def resolve_reasoning_params(effort: str | None, thinking: bool | None) -> tuple[str | None, bool | None]:
    if effort is None and thinking is not None:
        effort = "medium" if thinking else "none"
    return effort, thinking
