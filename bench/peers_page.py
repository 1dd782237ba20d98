"""docs/performance.md from the findings: ``python -m bench.peers_page FILE.json`` writes it anew beside the file."""

import sys
from collections.abc import Iterator
from pathlib import Path

from bench.peer_findings import Comparison, PeerFindings, against_ceiling, comparisons
from bench.scenarios import DEMO, TWIN
from exo.bench.options import Options
from exo.bench.plot import draw
from exo.bench.report import Report, Stage

PAGE, DATA, PLOT = "performance.md", "performance.json", "performance.png"
_GREEDY = [scenario for scenario in DEMO if scenario.name.startswith("greedy")]


def write(findings: PeerFindings, folder: Path) -> None:
    """The page, its plot and its data."""
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
        f"{host.cpu_count} processors, {host.memory_total / 2**30:.0f} GiB of memory, {devices}, {host.system}. "
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
    for scenario in (*DEMO, *TWIN):
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


def _row(scenario: str, peer: str, each: Comparison) -> str:
    ours, theirs, better = each.words()
    return f"| {scenario} | {each.name} | {ours} | {peer} | {theirs} | {better} |"


def _sweep(findings: PeerFindings, server: str) -> Report:
    """The greedy scenarios as one report: of each, the turn whose output rate is the median."""
    stages = tuple(_median(findings.stages(scenario.name, server)) for scenario in _GREEDY)
    return Report(
        date=findings.date,
        exo_version=next(each.version for each in findings.contenders if each.name == "exo"),
        client=findings.host.system,
        options=Options(url=server, model="gemma-3-270m"),
        stages=stages,
    )


def _median(stages: list[Stage]) -> Stage:
    return sorted(stages, key=lambda stage: stage.output_tokens_per_second)[len(stages) // 2]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write(PeerFindings.model_validate_json(source.read_text()), source.parent)
