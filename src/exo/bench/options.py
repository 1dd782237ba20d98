"""The options of a benchmark: the server, the requests and the load."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from exo.exit_code import CommandError, ExitCode

Endpoint = Literal["completions", "chat"]
Workload = Literal["random", "shared-prefix", "long-prompt", "repeat"]

_FEWEST_REQUESTS = 8


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Objective(_Frozen):
    """The limits in milliseconds that a good request meets; None is no limit.

    ``itl`` is the request's mean inter-token latency, as in other benchmarks; ``gap`` is its longest.
    """

    ttft: Milliseconds | None = None
    itl: Milliseconds | None = None
    gap: Milliseconds | None = None
    e2e: Milliseconds | None = None

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Parses text such as ``ttft:1000,itl:100``. Raises CommandError."""
        named: dict[str, float] = {}
        for part in text.split(","):
            name, _, limit = part.partition(":")
            try:
                named[name.strip()] = float(limit)
            except ValueError:
                message = f"--goodput: {part!r} must be NAME:MILLISECONDS, such as ttft:1000"
                raise CommandError(message, ExitCode.USAGE) from None
        try:
            return cls(**named)
        except ValidationError as error:
            names = ", ".join(cls.model_fields)
            raise CommandError(f"--goodput: {_first(error)}; accepted are {names}", ExitCode.USAGE) from error

    def __str__(self) -> str:
        """The form that ``parse`` reads."""
        return ",".join(f"{name}:{limit:g}" for name, limit in self.model_dump(exclude_none=True).items())


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _from_json(value: object) -> object:
    return from_json(value) if isinstance(value, str) else value


def _objective(value: object) -> object:
    return Objective.parse(value) if isinstance(value, str) else value


Rate = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]
Streams = Annotated[int, Field(ge=1, le=4096)]
Listed = BeforeValidator(_split)
"""Also accepts text with commas between the values."""


class BenchOptions(_Frozen):
    """One benchmark: a sweep over ``rates`` (open loop) or, if there are none, over ``concurrency`` (closed loop).

    Lengths are in words, because only the server has the tokenizer. Most tokenizers make one token of each word.
    """

    url: str = Field(min_length=1)
    """The server's address, with or without ``/v1``."""
    model: str = Field(min_length=1)
    endpoint: Endpoint = "completions"
    workload: Workload = "random"
    prompt_words: int = Field(default=40, ge=1, le=1_000_000)
    """Words of a prompt that no other prompt shares. With "repeat": words of the whole prompt."""
    shared_words: int = Field(default=400, ge=1, le=1_000_000)
    """Words at the beginning of all prompts of a stage, for "shared-prefix"."""
    sessions: int = Field(default=1, ge=1, le=1000)
    """Beginnings that the prompts of "shared-prefix" have in turn."""
    long_words: int = Field(default=2000, ge=1, le=1_000_000)
    """Words of the prompt that arrives among running streams, for "long-prompt"."""
    output_tokens: int = Field(default=64, ge=1, le=1_000_000)
    """``max_tokens``. With "long-prompt" it applies to the long prompt only."""
    stream_tokens: int = Field(default=2048, ge=64, le=1_000_000)
    """``max_tokens`` of the streams that "long-prompt" interrupts. A stream that ends too soon is replaced."""
    concurrency: Annotated[tuple[Streams, ...], Listed] = Field(default=(1, 4, 16), min_length=1)
    rates: Annotated[tuple[Rate, ...], Listed] = ()
    """Requests per second, which arrive as a Poisson process regardless of the number in flight."""
    requests: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests of each stage. Default: twice the concurrency or ten seconds' arrivals, and at least eight."""
    warmup: int = Field(default=1, ge=0, le=10_000)
    """Sequential requests before each stage that are not counted. They share the stage's prefix."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    ignore_eos: bool = True
    """Requests exactly ``max_tokens`` tokens, which OpenAI's own servers refuse."""
    token_ids: bool = False
    """Requests token ids (``return_token_ids``), so that each token is counted in the stream."""
    extra: Annotated[dict[str, JsonValue], BeforeValidator(_from_json)] = {}
    objective: Annotated[Objective | None, BeforeValidator(_objective)] = None
    time_limit: float = Field(default=300.0, gt=0, le=86_400)
    """Seconds per stage. Requests in flight at its end are cut and not counted."""
    api_key: SecretStr | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _one_loop(self) -> "BenchOptions":
        if self.rates and self.workload == "long-prompt":
            raise ValueError("rate: not accepted with --workload long-prompt, whose streams run all the time")
        return self

    @classmethod
    def check(cls, **values: object) -> "BenchOptions":
        """The options; None stands for a default. Raises CommandError, which names the invalid option."""
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise CommandError(f"--{_first(error)}", ExitCode.USAGE) from error

    def count(self, concurrency: int | None, rate: float | None) -> int:
        if self.requests is not None:
            return self.requests
        return max(_FEWEST_REQUESTS, 2 * concurrency if concurrency is not None else round(10 * (rate or 0)))


def _first(error: ValidationError) -> str:
    """The first problem, with the option's name."""
    problem = error.errors(include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0]).replace("_", "-")
    return f"{'rate' if name == 'rates' else name}: {message} (got {problem['input']!r})"
