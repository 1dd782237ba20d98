"""Measures exo beside its peers, which take turns in every scenario. Writes docs/performance.md, its plot and its data.

``python -m bench.peers [--pairs N] [--tiny] [--only TEXT] [--architecture NAME] [--docs FOLDER]``. ``--tiny`` is a
trial with small sizes, whose figures mean nothing. ``--only`` runs the scenarios whose names contain the text and
writes no page. ``--page FILE.json`` only writes the page again from its data.
"""

import argparse
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args
from zlib import crc32

import anyio

from bench import peer_report
from bench.busy import Busy
from bench.peer_report import (
    AGENT,
    BUSY,
    DEMO,
    SCENARIOS,
    TINY,
    TWIN,
    CeilingTurn,
    Contender,
    PeerFindings,
    Scenario,
    ServerTurn,
    ceiling,
)
from bench.servers import (
    AGENT_CONTEXT,
    AGENT_SLOTS,
    ROOT,
    MeasuredServer,
    bindings_server,
    commit,
    demo_server,
    end_within,
    llama_server,
    mlx_servers,
    set_up_peers,
)
from exo.bench.options import BenchOptions
from exo.bench.report import Stage
from exo.bench.run import run_bench
from exo.compare.comparison import HostFacts
from exo.worker.supervisor.host_probe import probe_host
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.shape import Architecture

CEILING_STREAMS = (1, 4, 8, 16)
_LIMIT_SECONDS = 3 * 3600.0


def ask(server: MeasuredServer, scenario: Scenario, pair: int, *, tiny: bool) -> Stage:
    """One turn. Each pair has its own prompts, so that none is in a cache. Exits unless every reply is complete."""
    options = BenchOptions(
        url=server.url,
        model=server.model,
        seed=crc32(f"{pair} {scenario.name}".encode()) >> 1,
        extra=dict(server.extra),
        time_limit=900,
        **scenario.sized(tiny=tiny),
    )
    (stage,) = run_bench(options).stages
    if stage.requests.errors or not stage.requests.whole:
        raise SystemExit(f"{server.name}, {scenario.name}: {stage.requests}")
    return stage


def take_turns(
    servers: Mapping[str, MeasuredServer], scenarios: Sequence[Scenario], pair: int, *, tiny: bool
) -> list[ServerTurn]:
    """One pair of every scenario: exo first, then each peer."""
    turns: list[ServerTurn] = []
    for scenario in scenarios:
        for server in (servers[name] for name in (scenario.us, *scenario.peers)):
            with Busy(own_session=True, one_core=True).running() if scenario.busy else nullcontext():
                stage = ask(server, scenario, pair, tiny=tiny)
            turns.append(ServerTurn(pair=pair, scenario=scenario.name, server=server.name, stage=stage))
            print(f"pair {pair}  {scenario.name:<40} {server.name:<18} {_figures(stage)}", flush=True)
    return turns


def _figures(stage: Stage) -> str:
    if stage.long_prompt is not None:
        during = stage.long_prompt.gaps_during
        return f"p99 {during.p99 if during else 0:8.1f} ms, first token {stage.long_prompt.ttft_ms:8.1f} ms"
    first = stage.ttft.p50 if stage.ttft else 0.0
    return f"{stage.output_tokens_per_second:8.1f} tokens/s, first token {first:8.1f} ms"


def run(pairs: int, home: Path, architecture: Architecture, only: str, *, tiny: bool) -> PeerFindings:
    """The demo model's servers together, then those with long slots, then the tiny model's."""
    turns: list[ServerTurn] = []
    ceilings: list[CeilingTurn] = []
    demo = (
        demo_server(home / "exo"),
        demo_server(home / "exo-speculating", ('speculate = "auto"',), "exo, speculating"),
        llama_server(),
        bindings_server(),
    )
    sizes = (f"n_ctx = {AGENT_CONTEXT}", f"slots = {AGENT_SLOTS}")
    agent = (
        demo_server(home / "exo-agent", sizes, "exo, two slots"),
        replace(llama_server(AGENT_SLOTS, AGENT_CONTEXT), name="llama-server, two slots"),
    )
    folder = home / "twin"
    write_mlx(folder, Shape(architecture))
    twin = mlx_servers(home, folder)
    for servers, all_scenarios in ((demo, DEMO), (agent, AGENT), (demo, BUSY), (twin, TWIN)):
        scenarios = [scenario for scenario in all_scenarios if only in scenario.name]
        needed = {name for scenario in scenarios for name in (scenario.us, *scenario.peers)}
        with _running([server for server in servers if server.name in needed], home) as running:
            for pair in range(pairs):
                turns += (done := take_turns(running, scenarios, pair, tiny=tiny))
                if all_scenarios is DEMO and not only:
                    tokens, whole = done[0].stage.tokens, done[0].stage.requests.whole
                    batches = ceiling(CEILING_STREAMS, tokens.prompt // whole, tokens.output // whole)
                    ceilings.append(CeilingTurn(pair=pair, batches=tuple(batches)))
    all_servers = (*demo, *agent, *twin)
    return PeerFindings(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        tiny=tiny,
        host=HostFacts.of(anyio.run(probe_host)),
        pairs=pairs,
        contenders=tuple(Contender(name=each.name, version=each.version, flags=each.flags) for each in all_servers),
        turns=tuple(turns),
        ceilings=tuple(ceilings),
    )


@contextmanager
def _running(servers: Sequence[MeasuredServer], home: Path) -> Generator[Mapping[str, MeasuredServer]]:
    with ExitStack() as running:
        for server in servers:
            running.enter_context(server.running(home / f"{server.name}.log"))
        yield {server.name: server for server in servers}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.peers", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help=f"a trial with {TINY}")
    parser.add_argument("--only", default="", help="the scenarios whose names contain this text; writes no page")
    parser.add_argument("--architecture", choices=get_args(Architecture), default="llama", help="of MLX's tiny model")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of the page")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of this data; measure nothing")
    arguments = parser.parse_args()
    if arguments.page is not None:
        findings = PeerFindings.model_validate_json(arguments.page.read_text())
        peer_report.write(findings, arguments.page.parent)
        return
    set_up_peers()
    end_within(_LIMIT_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        findings = run(arguments.pairs, Path(folder), arguments.architecture, arguments.only, tiny=arguments.tiny)
    if not arguments.only:
        arguments.docs.mkdir(parents=True, exist_ok=True)
        peer_report.write(findings, arguments.docs)
        print(f"wrote {arguments.docs / peer_report.PAGE}")
        return
    for scenario in SCENARIOS:
        ours = findings.stages(scenario.name, scenario.us)
        for peer in scenario.peers if ours else ():
            for each in peer_report.comparisons(ours, findings.stages(scenario.name, peer)):
                print(scenario.name, each.name, peer, *each.words(), sep=", ")


if __name__ == "__main__":
    main()
