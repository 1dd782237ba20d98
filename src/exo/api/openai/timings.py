"""llama-server's timings of a reply, for meters that read them."""

import time
from dataclasses import dataclass, field

from exo.worker.protocol.events import Usage


@dataclass(slots=True)
class Stopwatch:
    """Measures one request from the time that its model is loaded. Times are by ``time.monotonic_ns``."""

    begun: int = field(default_factory=time.monotonic_ns)
    first: int = 0
    """The time of the first token; 0 before."""
    tokens: int = 0
    """Tokens of all choices so far."""

    def took(self, tokens: int) -> None:
        """Notes new tokens."""
        self.first = self.first or time.monotonic_ns()
        self.tokens += tokens

    def timings(self, usage: Usage) -> dict[str, int | float]:
        """The timings so far. The time of the prompt includes that in the queue."""
        now = time.monotonic_ns()
        first = self.first or now
        drafts = {"draft_n": usage.drafted_tokens, "draft_n_accepted": usage.accepted_tokens}
        return {
            "cache_n": usage.cached_tokens,
            **_rates("prompt", usage.prompt_tokens - usage.cached_tokens, first - self.begun),
            **_rates("predicted", usage.completion_tokens, now - first),
            **(drafts if usage.drafted_tokens else {}),
        }


def _rates(name: str, tokens: int, nanoseconds: int) -> dict[str, int | float]:
    milliseconds = nanoseconds / 1e6
    return {
        f"{name}_n": tokens,
        f"{name}_ms": round(milliseconds, 3),
        f"{name}_per_token_ms": round(milliseconds / tokens, 3) if tokens else 0.0,
        f"{name}_per_second": round(1000 * tokens / milliseconds, 3) if milliseconds else 0.0,
    }
