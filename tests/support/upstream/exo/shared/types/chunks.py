from typing import Literal

from pydantic import BaseModel

from exo.api.types import GenerationStats, ToolCallItem, TopLogprobItem, Usage


class BaseChunk(BaseModel):
    model: str


class TokenChunk(BaseChunk):
    text: str
    token_id: int
    usage: Usage | None
    finish_reason: Literal["stop", "length", "content_filter"] | None = None
    stats: GenerationStats | None = None
    logprob: float | None = None
    top_logprobs: list[TopLogprobItem] | None = None
    is_thinking: bool = False


class ErrorChunk(BaseChunk):
    error_message: str
    finish_reason: Literal["error"] = "error"


class ToolCallChunk(BaseChunk):
    tool_calls: list[ToolCallItem]
    usage: Usage | None
    finish_reason: Literal["tool_calls"] = "tool_calls"
    stats: GenerationStats | None = None


class PrefillProgressChunk(BaseChunk):
    processed_tokens: int
    total_tokens: int


Chunk = PrefillProgressChunk | TokenChunk | ToolCallChunk | ErrorChunk
