"""The figures of ``bench.peers``: turns, comparisons, and the pages written from them."""

import math
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.servers import demo_model, llama_binary, llama_flags
from exo.bench.options import BenchOptions
from exo.bench.plot import draw
from exo.bench.report import Report, Stage
from exo.compare.comparison import HostFacts

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
TINY: dict[str, Any] = {
    "requests": 2, "output_tokens": 8, "prompt_words": 20, "long_words": 200, "shared_words": 50,
}  # fmt: skip
"""Replaces the real sizes in a trial."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load, and the servers that get it. ``fields`` are those of ``exo.bench.options.Options``."""

    name: str
    streams: int
    peers: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    us: str = "exo"
    busy: bool = False
    """Whether another process computes on one core meanwhile."""

    def sized(self, *, tiny: bool) -> dict[str, Any]:
        """The fields, with the sizes of a trial if ``tiny``."""
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
    Scenario("repeated text, 1 stream", 1, ("llama-server",), _REPEAT),
    Scenario("repeated text, 1 stream, told to speculate", 1, ("llama-server",), _REPEAT, "exo, speculating"),
)
"""With the demo model on llama.cpp."""
BUSY = (
    Scenario(
        "another process on one core, 1 stream", 1, ("llama-server",), {"requests": 2, "output_tokens": 16}, busy=True
    ),
)
"""With the same servers, started anew and last: they remember how busy the machine was."""
AGENT = (
    Scenario(
        "an agent's 16,000 tokens, two sessions in turn, tail changed",
        1,
        ("llama-server, two slots",),
        {
            "requests": 2,
            "warmup": 2,
            "workload": "shared-prefix",
            "sessions": 2,
            "shared_words": 14_400,
            "prompt_words": 1600,
            "output_tokens": 256,
        },
        "exo, two slots",
    ),
)
"""With the demo model in two long slots. Each session's first prompt is not counted."""
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
"""With the tiny model. They measure the servers, because the model takes hardly any time."""
SCENARIOS = (*DEMO, *AGENT, *BUSY, *TWIN)
PAGE, DATA, PLOT = "performance.md", "performance.json", "performance.png"
_GREEDY = [scenario for scenario in DEMO if scenario.name.startswith("greedy")]


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ceiling(_Finding):
    """One batch of ``llama-batched-bench``: ``streams`` sequences, each with a prompt and ``output_tokens``."""

    streams: int
    prompt_tokens: int
    output_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


class _Line(BaseModel):
    """The format of llama-batched-bench."""

    pl: int
    pp: int
    tg: int
    t_pp: float
    t_tg: float


def read_line(line: str) -> Ceiling:
    """Reads a line of llama-batched-bench's JSON output."""
    of = _Line.model_validate_json(line)
    return Ceiling(
        streams=of.pl, prompt_tokens=of.pp, output_tokens=of.tg, prefill_seconds=of.t_pp, decode_seconds=of.t_tg
    )


def ceiling(streams: Sequence[int], prompt_tokens: int, output_tokens: int) -> list[Ceiling]:
    """Runs llama-batched-bench: prefill and decode without a server or sampling."""
    sizes = ["-npp", str(prompt_tokens), "-ntg", str(output_tokens), "-npl", ",".join(map(str, streams))]
    command = [str(llama_binary("llama-batched-bench")), "-m", str(demo_model()), *llama_flags(), *sizes]
    done = subprocess.run([*command, "--output-format", "jsonl"], capture_output=True, text=True, check=True)
    return [read_line(line) for line in done.stdout.splitlines() if line.startswith("{")]


class Contender(_Finding):
    name: str
    version: str
    flags: str


class ServerTurn(_Finding):
    pair: int
    scenario: str
    server: str
    stage: Stage


class CeilingTurn(_Finding):
    """The turn of ``llama-batched-bench`` in a pair."""

    pair: int
    batches: tuple[Ceiling, ...]


class PeerFindings(_Finding):
    schema_version: int = 1
    date: str
    commit: str
    tiny: bool
    host: HostFacts
    pairs: int
    contenders: tuple[Contender, ...]
    turns: tuple[ServerTurn, ...]
    ceilings: tuple[CeilingTurn, ...]

    def stages(self, scenario: str, server: str) -> list[Stage]:
        return [turn.stage for turn in self.turns if turn.scenario == scenario and turn.server == server]


class PeerComparison(_Finding):
    """One figure of two servers. ``better`` is the ratio in each pair, above 1 where exo is better."""

    name: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    better: tuple[float, ...]

    def words(self) -> tuple[str, str, str]:
        ratio = f"{median(self.better):.2f} ({min(self.better):.2f} to {max(self.better):.2f})"
        return f"{median(self.ours):.1f} {self.unit}", f"{median(self.theirs):.1f} {self.unit}", ratio


def comparisons(ours: list[Stage], theirs: list[Stage]) -> Iterator[PeerComparison]:
    """The comparable figures of one scenario's stages, pair by pair."""
    if all(stage.long_prompt for stage in (*ours, *theirs)):
        yield _of("the others' p99 inter-token latency meanwhile", "ms", ours, theirs, _p99_meanwhile, higher=False)
        yield _of("the long prompt's time to first token", "ms", ours, theirs, _long_ttft, higher=False)
        return
    yield _of("output rate", "tokens/s", ours, theirs, lambda stage: stage.output_tokens_per_second, higher=True)
    yield _of("median time to first token", "ms", ours, theirs, _ttft, higher=False)
    yield _of("p99 inter-token latency", "ms", ours, theirs, _itl, higher=False)


def against_ceiling(stages: list[Stage], batches: list[Ceiling]) -> PeerComparison:
    """The time that the ceilings predict for the same work, divided by the time that it took."""
    ours = [stage.seconds for stage in stages]
    theirs = [
        batch.seconds * stage.requests.whole / batch.streams for stage, batch in zip(stages, batches, strict=True)
    ]
    better = [predicted / took for predicted, took in zip(theirs, ours, strict=True)]
    return PeerComparison(name="time", unit="s", ours=tuple(ours), theirs=tuple(theirs), better=tuple(better))


def _of(
    name: str, unit: str, ours: list[Stage], theirs: list[Stage], figure: Callable[[Stage], float], *, higher: bool
) -> PeerComparison:
    mine, others = [figure(stage) for stage in ours], [figure(stage) for stage in theirs]
    pairs = zip(mine, others, strict=True)
    better = [_ratio(our, their) if higher else _ratio(their, our) for our, their in pairs]
    return PeerComparison(name=name, unit=unit, ours=tuple(mine), theirs=tuple(others), better=tuple(better))


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf


def _ttft(stage: Stage) -> float:
    return stage.ttft.p50 if stage.ttft else math.nan


def _itl(stage: Stage) -> float:
    return stage.itl.p99 if stage.itl else math.nan


def _p99_meanwhile(stage: Stage) -> float:
    return stage.long_prompt.gaps_during.p99 if stage.long_prompt and stage.long_prompt.gaps_during else math.nan


def _long_ttft(stage: Stage) -> float:
    return stage.long_prompt.ttft_ms if stage.long_prompt else math.nan


def write(findings: PeerFindings, folder: Path) -> None:
    (folder / DATA).write_text(findings.model_dump_json(indent=1) + "\n")
    draw({name: _sweep(findings, name) for name in ("exo", "llama-server")}, folder / PLOT)
    (folder / PAGE).write_text("\n".join(_lines(findings)) + "\n")


def _lines(findings: PeerFindings) -> Iterator[str]:
    host = findings.host
    devices = ", ".join(host.nvidia_devices) or "no NVIDIA device"
    yield "# Performance beside the peers"
    yield ""
    if findings.tiny:
        yield "**A trial with tiny sizes: these figures mean nothing.**"
        yield ""
    yield (
        f"Written by `make bench-peers` on {findings.date[:10]} at commit {findings.commit}: {host.processor}, "
        f"{host.cpu_count} logical CPUs, {host.memory_total / 2**30:.0f} GiB of memory, {devices}, {host.system}. "
        f"All servers ran side by side and took turns, {findings.pairs} times. Within a pair each gets the same "
        "prompts, which no earlier turn has had. Figures are medians. A ratio is taken within each pair and is above 1 "
        "where exo is better. The range over the pairs is in brackets."
    )
    yield ""
    yield "| server | version | started as |"
    yield "|---|---|---|"
    for each in findings.contenders:
        yield f"| {each.name} | {each.version} | `{each.flags}` |"
    yield ""
    yield "The model is Gemma 3 270M, Q4_K_M. For MLX it is a tiny random one, so that the servers' own cost shows."
    yield ""
    yield "| scenario | figure | exo | peer | the peer's | ratio |"
    yield "|---|---|---|---|---|---|"
    for scenario in SCENARIOS:
        ours = findings.stages(scenario.name, scenario.us)
        for peer in scenario.peers:
            for each in comparisons(ours, findings.stages(scenario.name, peer)):
                yield _row(scenario.name, peer, each)
    yield ""
    yield f"![Output rate and latency against streams]({PLOT})"
    yield ""
    yield "## Beside the engine alone"
    yield ""
    yield (
        "`llama-batched-bench` prefills and decodes the same batches without a server. The share is the time that it "
        "predicts for the same work, divided by exo's time from the first request to the last token:"
    )
    yield ""
    yield "| scenario | exo | predicted | share |"
    yield "|---|---|---|---|"
    for scenario in _GREEDY:
        batches = [each for turn in findings.ceilings for each in turn.batches if each.streams == scenario.streams]
        took, predicted, share = against_ceiling(findings.stages(scenario.name, "exo"), batches).words()
        yield f"| {scenario.name} | {took} | {predicted} | {share} |"
    yield ""
    yield f"Every number of every turn is in [{DATA}]({DATA})."


def _row(scenario: str, peer: str, each: PeerComparison) -> str:
    ours, theirs, better = each.words()
    return f"| {scenario} | {each.name} | {ours} | {peer} | {theirs} | {better} |"


def _sweep(findings: PeerFindings, server: str) -> Report:
    """The greedy scenarios as one report, with the turn of median output rate for each."""
    stages = tuple(_median(findings.stages(scenario.name, server)) for scenario in _GREEDY)
    return Report(
        date=findings.date,
        exo_version=next(each.version for each in findings.contenders if each.name == "exo"),
        client=findings.host.system,
        options=BenchOptions(url=server, model="gemma-3-270m"),
        stages=stages,
    )


def _median(stages: list[Stage]) -> Stage:
    return sorted(stages, key=lambda stage: stage.output_tokens_per_second)[len(stages) // 2]
