"""exo beside its peers: every scenario in turn, A B A B, in one run. Writes docs/performance.md, its plot and its data.

``python -m bench.peers [--pairs N] [--tiny] [--docs FOLDER]``; ``make bench-peers`` sets everything up first. With
``--tiny`` the sizes are those of a try, and the figures say nothing.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from zlib import crc32

import anyio

from bench import peers_page, peers_setup
from bench.ceiling import ceiling
from bench.peer_findings import CeilingTurn, Contender, PeerFindings, Turn
from bench.peer_servers import (
    Name,
    Server,
    bindings_server,
    exo_server,
    llama_server,
    mlx_servers,
    speculating_server,
)
from bench.scenarios import DEMO, TINY, TWIN, Scenario
from bench.time_limit import end_within
from exo.bench.options import Options
from exo.bench.report import Stage
from exo.bench.run import run_bench
from exo.compare.evidence import host_facts
from exo.worker.supervisor.host_probe import probe_host
from tests.support.tiny import Shape, write_mlx

CEILING_STREAMS = (1, 4, 8, 16)
_LIMIT_SECONDS = 3 * 3600.0


def ask(server: Server, scenario: Scenario, pair: int, *, tiny: bool) -> Stage:
    """One turn. A pair's scenario has prompts of its own, so that none is in a cache. Every reply has to be whole."""
    options = Options(
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


def take_turns(servers: Mapping[Name, Server], scenarios: Sequence[Scenario], pair: int, *, tiny: bool) -> list[Turn]:
    """One pair of every scenario: exo first, then each peer."""
    turns: list[Turn] = []
    for scenario in scenarios:
        for server in (servers[name] for name in (scenario.us, *scenario.peers)):
            stage = ask(server, scenario, pair, tiny=tiny)
            turns.append(Turn(pair=pair, scenario=scenario.name, server=server.name, stage=stage))
            print(f"pair {pair}  {scenario.name:<40} {server.name:<18} {_figures(stage)}", flush=True)
    return turns


def _figures(stage: Stage) -> str:
    if stage.long_prompt is not None:
        during = stage.long_prompt.gaps_during
        return f"p99 {during.p99 if during else 0:8.1f} ms, first token {stage.long_prompt.ttft_ms:8.1f} ms"
    first = stage.ttft.p50 if stage.ttft else 0.0
    return f"{stage.output_tokens_per_second:8.1f} tokens/s, first token {first:8.1f} ms"


def run(pairs: int, home: Path, *, tiny: bool) -> PeerFindings:
    """Everything: the demo model's servers together, then the tiny model's."""
    turns: list[Turn] = []
    ceilings: list[CeilingTurn] = []
    demo = (exo_server(home), speculating_server(home), llama_server(), bindings_server())
    folder = home / "twin"
    write_mlx(folder, Shape())
    twin = mlx_servers(home, folder)
    with _running(demo, home) as servers:
        for pair in range(pairs):
            done = take_turns(servers, DEMO, pair, tiny=tiny)
            turns += done
            first = done[0].stage
            prompt, output = first.tokens.prompt // first.requests.whole, first.tokens.output // first.requests.whole
            ceilings.append(CeilingTurn(pair=pair, batches=tuple(ceiling(CEILING_STREAMS, prompt, output))))
    with _running(twin, home) as servers:
        for pair in range(pairs):
            turns += take_turns(servers, TWIN, pair, tiny=tiny)
    return PeerFindings(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        tiny=tiny,
        host=host_facts(anyio.run(probe_host)),
        pairs=pairs,
        contenders=tuple(Contender(name=each.name, version=each.version, flags=each.flags) for each in (*demo, *twin)),
        turns=tuple(turns),
        ceilings=tuple(ceilings),
    )


@contextmanager
def _running(servers: Sequence[Server], home: Path) -> Generator[Mapping[Name, Server]]:
    with ExitStack() as running:
        for server in servers:
            running.enter_context(server.running(home / f"{server.name}.log"))
        yield {server.name: server for server in servers}


def commit() -> str:
    """The commit that is measured, with a remark if the working tree differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=peers_setup.ROOT)
        return done.stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def main() -> None:
    """Sets up, runs, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help=f"try it all with {TINY}")
    parser.add_argument("--docs", type=Path, default=peers_setup.ROOT / "docs", help="where the page and the rest go")
    arguments = parser.parse_args()
    peers_setup.main()
    end_within(_LIMIT_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        findings = run(arguments.pairs, Path(folder), tiny=arguments.tiny)
    arguments.docs.mkdir(parents=True, exist_ok=True)
    peers_page.write(findings, arguments.docs)
    print(f"wrote {arguments.docs / peers_page.PAGE}")


if __name__ == "__main__":
    main()
