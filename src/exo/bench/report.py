"""A benchmark's report. A change of its JSON's names or meanings raises ``SCHEMA_VERSION``."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from exo.bench.options import BenchOptions

SCHEMA_VERSION: Literal[1] = 1


class _BenchFinding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Distribution(_BenchFinding):
    """Milliseconds. Percentiles are interpolated between the two nearest ranks."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class LoadResult(_BenchFinding):
    """Requests in flight, or requests per second. The other is None."""

    concurrency: int | None
    rate: float | None


class Requests(_BenchFinding):
    """Requests by result. The client hung up on ``cut`` ones: at the time limit, and at the end of a long prompt."""

    sent: int
    whole: int
    cut: int
    errors: dict[str, int]
    """By kind, such as ``http_429``. ``token_count``: the stream and the usage disagree."""
    messages: dict[str, str]
    """The first message of each kind."""


class Tokens(_BenchFinding):
    """Tokens of complete requests, from the server's usage."""

    prompt: int
    cached: int | None
    """Prompt tokens from a cache; None if the server does not state them."""
    output: int
    counted_by_usage: int
    """Requests with a usage. For the others, chunks with text are counted, and prompts are not."""
    checked_by_ids: int
    """Requests with as many token ids in the stream as the usage states. All others had at most one chunk per token."""


class Goodput(_BenchFinding):
    """Requests that met the objective: per second, and as a share of the requests that were not cut."""

    objective: str
    good: int
    requests_per_second: float
    share: float


class LongPrompt(_BenchFinding):
    """A long prompt among running streams. Gaps are between chunks of a stream."""

    prompt_tokens: int
    ttft_ms: float
    gaps_before: Distribution | None
    gaps_during: Distribution | None
    """The gaps that overlap with the long prompt's wait for its first token."""
    stream_chunks_per_second_before: float
    stream_chunks_per_second_during: float


class Stage(_BenchFinding):
    """The figures of one load. Rates are over ``seconds``, from the first request's start to the last one's end."""

    load: LoadResult
    requests: Requests
    tokens: Tokens
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    goodput: Goodput | None
    ttft: Distribution | None
    """From the request, connecting included, to the first chunk with text."""
    itl: Distribution | None
    """Inter-token latency: each time between two chunks with text."""
    tpot: Distribution | None
    """The mean time per output token after the first of each request."""
    e2e: Distribution | None
    long_prompt: LongPrompt | None


class Report(_BenchFinding):
    schema_version: Literal[1] = SCHEMA_VERSION
    date: str
    """ISO 8601, UTC."""
    exo_version: str
    client: str
    options: BenchOptions
    stages: tuple[Stage, ...]
