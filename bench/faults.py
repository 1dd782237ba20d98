"""Kills, stops and floods ``exo serve`` at random times while eight streams run, and checks every token.

``python -m bench.faults [--model tiny|demo] [--runner cuda|mlx] [--kills N] [--stops N] [--floods N] [--seed N]
[--json FILE]``. Without arguments: the three campaigns of ``CAMPAIGNS``. Exits with status 1 if a promise is broken.
Has a time limit, and all traffic stays on this machine.
"""

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from bench.campaign import MAX_QUEUE, Campaign, plan
from bench.fault_report import (
    Choices,
    Deaths,
    FaultReport,
    Floods,
    ServerFacts,
    Streams,
    different,
    differing_texts,
    lines,
)
from bench.servers import end_within
from bench.streams import client_of
from bench.target import FaultTarget, LoadTime, demo, load_time, tiny
from bench.texts import continuations, judge_all
from tests.support.server import ServeProgram

CAMPAIGNS = (("tiny", "cuda", 200), ("tiny", "mlx", 40), ("demo", "cuda", 30))
"""Model, runner and kills."""
_SHARE = 40
"""Kills per stop and per flood, which take longer."""
_SECONDS_EACH = {"kill": 15.0, "stop": 60.0, "flood": 30.0, "rest": 300.0}
"""Generous times; their sum is the time limit."""
_LAST_SECONDS = 900
"""Further time for the undisturbed run and the judgement of the texts."""


@dataclass(frozen=True, slots=True)
class Options:
    model: str
    runner: str
    kills: int
    stops: int
    floods: int
    seed: int

    @property
    def limit(self) -> float:
        """The time limit of all faults in seconds."""
        counts = {"kill": self.kills, "stop": self.stops, "flood": self.floods, "rest": 1}
        return sum(seconds * counts[name] for name, seconds in _SECONDS_EACH.items())


def run(options: Options, home: Path) -> FaultReport:
    """Runs one campaign on a server of its own with its files in ``home``."""
    _note(f"{options.model} model on runner {options.runner}")
    target = asyncio.run(tiny(home, options.runner) if options.model == "tiny" else demo())
    load = load_time(target.engine)
    dice = random.Random(options.seed)
    kinds = plan(options.kills, options.stops, options.floods, dice)
    with ServeProgram(home, *target.arguments, EXO_MAX_QUEUE=str(MAX_QUEUE)) as server:
        _note("the undisturbed run")
        campaign = Campaign(server, target, kinds, dice, load.start + load.load)
        asyncio.run(campaign.undisturbed())
        before = _memory(server)
        _note(f"{len(kinds)} faults")
        asyncio.run(campaign.run(options.limit))
        after = _memory(server)
        outcome = campaign.outcome
        doubtful = [] if target.exact else different(outcome)
        _note(f"continuations of {len(doubtful)} texts")
        asked = asyncio.run(continuations(client_of(server.url), target, doubtful))
        ended = _end(server, before, after)
    texts = [] if target.exact else differing_texts(target, outcome, asked)
    _note(f"judging {len(texts)} texts")
    ties = judge_all(target.engine, texts)
    same = sum(each.difference() is None for each in asked)
    choices = Choices(continuations=len(asked), continuations_same=same, near_ties=tuple(ties))
    return _report(options, target, load, campaign, ended, choices)


def _report(
    options: Options, target: FaultTarget, load: LoadTime, campaign: Campaign, server: ServerFacts, choices: Choices
) -> FaultReport:
    outcome = campaign.outcome
    return FaultReport(
        target=target.name,
        runner=target.engine.name,
        seed=options.seed,
        seconds=outcome.seconds,
        start_seconds=load.start,
        load_seconds=load.load,
        finished=outcome.finished,
        exact=target.exact,
        streams=Streams.of(outcome, exact=target.exact),
        deaths=Deaths.of(outcome),
        floods=Floods.of(outcome, options.floods),
        server=server,
        choices=choices,
    )


def _note(doing: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {doing}", file=sys.stderr, flush=True)


def _memory(server: ServeProgram) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


def _end(server: ServeProgram, before: int, after: int) -> ServerFacts:
    """Stops the server as an operator would."""
    children, runners = server.children(), len(server.runners())
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(60)
    left = psutil.wait_procs(children, timeout=5)[1]
    return ServerFacts(
        memory_before=before,
        memory_after=after,
        extra_runners=runners - 1,
        exit_status=status,
        children_after_exit=len(left),
    )


def _chosen(arguments: argparse.Namespace) -> list[Options]:
    found: list[Options] = []
    for model, runner, kills in CAMPAIGNS:
        if arguments.model in (None, model) and arguments.runner in (None, runner):
            number = kills if arguments.kills is None else int(arguments.kills)
            share = -(-number // _SHARE)
            stops, floods = (share if given is None else int(given) for given in (arguments.stops, arguments.floods))
            found.append(Options(model, runner, number, stops, floods, arguments.seed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.faults", description=__doc__)
    parser.add_argument("--model", choices=["tiny", "demo"])
    parser.add_argument("--runner", choices=["cuda", "mlx"])
    for name in ("--kills", "--stops", "--floods"):
        parser.add_argument(name, type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = _chosen(arguments)
    if not chosen:
        parser.error("--model demo: only with --runner cuda")
    reports: list[FaultReport] = []
    for options in chosen:
        end_within(options.limit + _LAST_SECONDS)
        with tempfile.TemporaryDirectory() as home:
            reports.append(run(options, Path(home)))
        print(*lines(reports[-1]), "", sep="\n", flush=True)
        if arguments.json is not None:
            arguments.json.write_bytes(TypeAdapter(list[FaultReport]).dump_json(reports, indent=2))
    sys.exit(0 if all(report.kept() for report in reports) else 1)


if __name__ == "__main__":
    main()
