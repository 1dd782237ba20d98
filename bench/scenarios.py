"""What every server is asked, and which peer exo is measured beside on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.peer_servers import Name

SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
TINY: dict[str, Any] = {"requests": 2, "output_tokens": 8, "long_words": 200, "shared_words": 50}
"""Instead of the real sizes, to see that it all works."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load. ``fields`` are of ``exo.bench.options.Options``."""

    name: str
    streams: int
    peers: tuple[Name, ...]
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    us: Name = "exo"

    def sized(self, *, tiny: bool) -> dict[str, Any]:
        """The fields, with those of a try where it is one."""
        return {"concurrency": (self.streams,), **self.fields, **(TINY if tiny else {})}


_REPEAT = {"requests": 2, "workload": "repeat", "prompt_words": 160, "output_tokens": 256}

DEMO = (
    Scenario("greedy, 1 stream", 1, ("llama-server",), {"requests": 4}),
    Scenario("greedy, 4 streams", 4, ("llama-server", "llama-cpp-python"), {"requests": 8}),
    Scenario("greedy, 16 streams", 16, ("llama-server",), {"requests": 32}),
    Scenario("sampled, 8 streams", 8, ("llama-server",), {"requests": 16, **SAMPLED}),
    Scenario(
        "shared prefix of 400 words, 4 streams", 4, ("llama-server",), {"requests": 4, "workload": "shared-prefix"}
    ),
    Scenario(
        "prompt of 4,000 words among 8 streams",
        8,
        ("llama-server",),
        {"workload": "long-prompt", "long_words": 4000, "output_tokens": 16},
    ),
    Scenario(
        "repeated text, 1 stream",
        1,
        ("llama-server",),
        _REPEAT,
    ),
    Scenario("repeated text, 1 stream, told to speculate", 1, ("llama-server",), _REPEAT, "exo, speculating"),
)
"""Of the demo model, on llama.cpp."""
TWIN = tuple(
    Scenario(
        f"tiny model on MLX, {streams} stream{'s' if streams > 1 else ''}",
        streams,
        ("mlx_lm.server",),
        {"requests": 2 * streams, "output_tokens": 512, "prompt_words": 8, "ignore_eos": False},
        "exo on MLX",
    )
    for streams in (1, 8)
)
"""Of the tiny model: it measures the servers, since the model costs next to nothing."""
