"""Ollama's model options: those that are supported, and those that have no effect."""

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, JsonValue

from exo.api.http.body import RequestBody, Unsupported
from exo.api.openai.common_request import (
    FrequencyPenalty,
    LastTokens,
    MinP,
    PresencePenalty,
    Seed,
    Stops,
    TopK,
    TopP,
    penalty_window,
)

_NEUTRAL: Unsupported = {
    "embedding_only": (False,),
    "f16_kv": (True,),
    "logits_all": (False,),
    "low_vram": (False,),
    "main_gpu": (0,),
    "mirostat": (0,),
    "mirostat_eta": (0.1,),
    "mirostat_tau": (5, 5.0),
    "num_batch": (),
    "num_gpu": (-1,),
    "num_keep": (0,),
    "num_thread": (0,),
    "numa": (False,),
    "penalize_newline": (True,),
    "tfs_z": (1, 1.0),
    "typical_p": (1, 1.0),
    "use_mlock": (False,),
    "use_mmap": (True,),
    "vocab_only": (False,),
}
"""Options without effect, and the values that need no warning. Some are fixed when a model is loaded."""


class LoadOptions(RequestBody):
    """Options of every request."""

    ignored: ClassVar[Unsupported] = _NEUTRAL

    num_ctx: int | None = Field(
        default=None,
        ge=1,
        le=1 << 31,
        description="Tokens that the context should hold. The model card decides, by n_ctx in its table for the "
        "runner; x-exo-warning tells where that is less.",
    )


def _length(value: JsonValue) -> JsonValue:
    """Makes None of Ollama's values for "no limit". They only differ where a context shift exists."""
    return None if type(value) is int and value in (0, -1, -2) else value


class OllamaOptions(LoadOptions):
    """Options of generation. If a request does not set one, the model card decides, then the default."""

    num_predict: Annotated[int | None, BeforeValidator(_length)] = Field(
        default=None, ge=1, le=1 << 31, description="Tokens at most; 0, -1 and -2: until the context is full."
    )
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 always takes the most probable token.")
    top_k: TopK = Field(default=0, description="Keep this many tokens; 0 or -1 keeps all.")
    top_p: TopP = Field(default=1.0, description="Keep the most probable tokens up to this sum; 0 keeps one.")
    min_p: MinP = 0.0
    repeat_penalty: float = Field(default=1.0, ge=0.01, le=100, description="1 is none.")
    repeat_last_n: LastTokens = None
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    seed: Seed = None
    stop: Stops = Field(default=[], description="A string or up to 16 strings that end the reply.")

    def sampling(self) -> dict[str, float]:
        """The options that are set, under the names of ``SamplingParams``."""
        given: dict[str, float] = self.model_dump(
            include={"temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty"},
            exclude_unset=True,
        )
        if "repeat_penalty" in self.model_fields_set:
            given["repetition_penalty"] = self.repeat_penalty
        if self.repeat_last_n is not None:
            given |= penalty_window(self.repeat_last_n)
        return given


class EmbedOptions(LoadOptions):
    """Options of requests that generate nothing."""

    ignored: ClassVar[Unsupported] = {
        **_NEUTRAL,
        **{name: () for name in OllamaOptions.model_fields if name not in LoadOptions.model_fields},
    }
