"""Takes hosts away from ``exo serve`` while eight streams run on them, and checks every token.

``python -m bench.host_losses [--losses N] [--seed N] [--json FILE]``. Two hosts behind sshd, each in a network
namespace of its own, take turns; this machine computes only the undisturbed run. Needs root and openssh-server. Also
measures what ssh adds to the time of a token. Exits with status 1 if a promise is broken.
"""

import argparse
import asyncio
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import psutil
from pydantic import BaseModel, JsonValue

from bench.fault_report import promise_lines
from bench.servers import end_within
from bench.streams import WatchedStream, client_of
from bench.target import STREAMS
from bench.texts import align
from tests.support.hosts import write_hosts
from tests.support.server import ServeProgram, write_card
from tests.support.ssh_host import SshHost, server_namespace, why_not
from tests.support.tiny import Shape, write_gguf

Loss = Literal["runner", "session", "node", "cut"]
"""SIGKILL to the runner, to its session's sshd or to the node program; the cable is cut."""

_TOKENS = 1500
_LOSSES = 20
_SECONDS_EACH, _FURTHER_SECONDS = 60.0, 600.0
_LONGEST_PAUSE = 1.0
_ROUND_TRIPS = 400
_MOST_ADDED = 0.5e-3
_MODEL, _LOCAL, _FAR = "moving", "here", "far"


class HostLossReport(BaseModel):
    """Times in seconds. ``gaps`` are the longest of each loss between two tokens of a stream, by kind."""

    seed: int
    losses: int
    finished: bool
    streams: int
    streams_lost: int
    errors: tuple[str, ...]
    cuts: int
    tokens: int
    tokens_lost: int
    tokens_doubled: int
    different: int
    usage_wrong: int
    gaps: dict[str, list[float]]
    orphans: int
    """Processes on the hosts after the server has ended."""
    local_round_trip: float
    """The median time of a request for one token whose prompt is cached, and the same by ssh."""
    ssh_round_trip: float
    local_token: float
    """The median time between two tokens of a lone stream, and the same by ssh."""
    ssh_token: float

    def promises(self) -> dict[str, bool]:
        added = self.ssh_round_trip - self.local_round_trip
        return {
            "every loss within the time limit, and under streams": self.finished and all(map(len, self.gaps.values())),
            "no stream lost": self.streams_lost == 0 < self.streams,
            "no token lost, none doubled": self.tokens_lost == self.tokens_doubled == 0,
            "every text and usage is that of the undisturbed run": self.different == self.usage_wrong == 0,
            "no process stays on a host": self.orphans == 0,
            f"ssh adds at most {_MOST_ADDED * 1e3:g} ms to a round trip at the median": added <= _MOST_ADDED,
        }


@dataclass(slots=True)
class HostLosses:
    """``hosts`` serve the streams in turn: the one that loses them is left for the other."""

    server: ServeProgram
    hosts: Sequence[SshHost]
    dice: random.Random
    undisturbed: list[WatchedStream] = field(default_factory=list[WatchedStream])
    streams: list[WatchedStream] = field(default_factory=list[WatchedStream])
    gaps: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in get_args(Loss)})
    finished: bool = False
    _running: dict[int, WatchedStream] = field(default_factory=dict[int, WatchedStream])
    _over: bool = False
    _last: dict[int, float] = field(default_factory=dict[int, float])
    """The time of the last token, by stream."""
    _gap: float = 0.0
    """The longest time between two tokens since the last strike."""

    async def run(self, kinds: Sequence[Loss], limit: float) -> None:
        client = client_of(self.server.url)
        self.undisturbed = [WatchedStream(number, _TOKENS) for number in range(STREAMS)]
        await asyncio.gather(*(each.read(client, body(_LOCAL, each.number)) for each in self.undisturbed))
        with suppress(TimeoutError):
            async with asyncio.timeout(limit), asyncio.TaskGroup() as tasks:
                for number in range(STREAMS):
                    tasks.create_task(self._keep_streaming(number))
                for kind in kinds:
                    await self._lose(kind)
                self._over = True
            self.finished = True

    async def _keep_streaming(self, number: int) -> None:
        while not self._over:
            stream = self._running[number] = WatchedStream(number, _TOKENS)
            self._last.pop(number, None)
            await stream.read(client_of(self.server.url), body(_MODEL, number), partial(self._on_tokens, number))
            self.streams.append(stream)

    def _on_tokens(self, number: int) -> None:
        now = time.perf_counter()
        self._gap = max(self._gap, now - self._last.get(number, now))
        self._last[number] = now

    async def _lose(self, kind: Loss) -> None:
        await until(lambda: all(host.name in self._up() for host in self.hosts))
        await until(lambda: len([*self._in_flight()]) > STREAMS // 2)
        await asyncio.sleep(self.dice.uniform(0, _LONGEST_PAUSE))
        await until(lambda: self._serving() is not None and bool([*self._in_flight()]))
        host = self._serving()
        assert host is not None
        print(f"{time.strftime('%H:%M:%S')} {host.name}: {kind}", file=sys.stderr, flush=True)
        self._gap, died = 0.0, time.perf_counter()
        strike(host, kind)
        for stream in self._in_flight():
            stream.cut(died)
        # Tokens that were under way still come. The loss counts from when the server knows of it.
        await until(lambda: self._serving() is not host)
        noticed, streams = time.perf_counter(), [*self._in_flight()]
        await until(lambda: all(self._has_gone_on(each, noticed) for each in streams))
        self.gaps[kind].append(self._gap)
        if kind == "cut":
            host.mend()

    def _serving(self) -> SshHost | None:
        """The host whose runner serves the streams now."""
        data = self.server.client.get("/v1/instances").json()["data"]
        serving = [each for each in data if each["state"] in ("Ready", "Running")]
        names = {each["host"] for each in serving if each["model"] == f"test/{_MODEL}"}
        return next((host for host in self.hosts if host.name in names), None)

    def _has_gone_on(self, stream: WatchedStream, since: float) -> bool:
        return stream.done or bool(stream.error) or self._last.get(stream.number, 0.0) > since

    def _up(self) -> list[str]:
        text = self.server.client.get("/metrics").text
        return re.findall(r'^exo:host_up\{host="(.*)"\} 1\.0$', text, re.MULTILINE)

    def _in_flight(self) -> Iterator[WatchedStream]:
        return (stream for stream in self._running.values() if stream.in_flight)


def strike(host: SshHost, kind: Loss) -> None:
    match kind:
        case "runner":
            for each in host.runners():
                each.kill()
        case "session":
            host.end_sessions()
        case "node":
            for each in host.processes():
                with suppress(psutil.Error):
                    if each.cmdline()[-3:-1] == ["exo", "node"]:
                        each.kill()
        case "cut":
            host.cut()


def body(model: str, number: int) -> dict[str, object]:
    return {"model": model, "prompt": f"story {number}", "seed": number, "ignore_eos": True, "temperature": 0.9}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - most conditions have no event
        await asyncio.sleep(0.02)


async def round_trips(url: str) -> tuple[float, float]:
    """The medians for this machine and for the host, asked in turn."""
    client, times = client_of(url), dict[str, list[float]]()
    for _ in range(_ROUND_TRIPS):
        for model in (_LOCAL, _FAR):
            stream = WatchedStream(0, 1)
            await stream.read(client, body(model, 0))
            times.setdefault(model, []).append(stream.seconds)
    return statistics.median(times[_LOCAL]), statistics.median(times[_FAR])


async def token_times(url: str) -> tuple[float, float]:
    """The medians of the time between two tokens for this machine and for the host, each of a lone stream."""
    found: list[float] = []
    for model in (_LOCAL, _FAR):
        moments: list[float] = []
        await WatchedStream(0, _TOKENS).read(client_of(url), body(model, 0), partial(note_time, moments))
        found.append(statistics.median(after - before for before, after in pairwise(moments)))
    return found[0], found[1]


def note_time(moments: list[float]) -> None:
    moments.append(time.perf_counter())


def run(losses: int, seed: int, home: Path) -> HostLossReport:
    shape = Shape(context_length=2048)
    write_gguf(home / "tiny.gguf", shape)
    table: dict[str, JsonValue] = {"path": str(home / "tiny.gguf"), "n_ctx": 2048, "slots": STREAMS, "threads": 1}
    table |= {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
    where: dict[str, list[JsonValue]] = {_LOCAL: ["local"], _FAR: ["gpu2"], _MODEL: ["gpu2", "gpu3"]}
    for name, hosts in where.items():
        write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"], hosts=hosts, replicas=1)
    dice = random.Random(seed)
    kinds = [kind for kind in get_args(Loss) for _ in range(-(-losses // len(get_args(Loss))))][:losses]
    dice.shuffle(kinds)
    with server_namespace() as namespace:
        hosts = [SshHost(home, name, namespace, number) for number, name in enumerate(("gpu2", "gpu3"))]
        with hosts[0].running(), hosts[1].running():
            write_hosts(home, *hosts)
            with ServeProgram(home) as server:
                trips, tokens = asyncio.run(round_trips(server.url)), asyncio.run(token_times(server.url))
                server.client.post("/v1/models/unload", json={"model": _FAR})
                campaign = HostLosses(server, hosts, dice)
                asyncio.run(campaign.run(kinds, losses * _SECONDS_EACH))
            deadline = time.monotonic() + 30
            while (left := [each for host in hosts for each in host.processes()]) and time.monotonic() < deadline:
                time.sleep(0.1)
    return report(seed, campaign, trips, tokens, len(left))


def report(
    seed: int, campaign: HostLosses, trips: tuple[float, float], tokens: tuple[float, float], orphans: int
) -> HostLossReport:
    expected = {each.number: each for each in campaign.undisturbed}
    whole = [each for each in campaign.streams if each.done]
    lost = [each for each in campaign.streams if not each.done]
    found = [align(expected[each.number].ids, each.ids) for each in whole]
    return HostLossReport(
        seed=seed,
        losses=sum(map(len, campaign.gaps.values())),
        finished=campaign.finished,
        streams=len(whole),
        streams_lost=len(lost),
        errors=tuple(dict.fromkeys(each.error or str(each.refused) for each in lost))[:5],
        cuts=sum(len(each.cuts) for each in campaign.streams),
        tokens=sum(len(each.ids) for each in whole),
        tokens_lost=sum(each.lost for each in found),
        tokens_doubled=sum(each.doubled for each in found),
        different=sum(each.reply.text != expected[each.number].reply.text for each in whole),
        usage_wrong=sum(not each.usage_exact for each in whole),
        gaps=campaign.gaps,
        orphans=orphans,
        local_round_trip=trips[0],
        ssh_round_trip=trips[1],
        local_token=tokens[0],
        ssh_token=tokens[1],
    )


def lines(report: HostLossReport) -> Iterator[str]:
    yield f"== {report.losses} losses of a host by ssh, seed {report.seed}"
    yield f"streams       {report.streams} whole, {report.streams_lost} lost, {report.cuts} cuts"
    yield from (f"              {each}" for each in report.errors)
    yield f"tokens        {report.tokens} delivered, {report.tokens_lost} lost, {report.tokens_doubled} doubled"
    yield f"texts         {report.different} differ; usage: {report.usage_wrong} wrong"
    for kind, gaps in report.gaps.items():
        if gaps:
            yield f"gap, {kind:<9}{len(gaps)}: median {statistics.median(gaps):.2f} s, longest {max(gaps):.2f} s"
    yield f"round trip    {report.local_round_trip * 1e3:.2f} ms here, {report.ssh_round_trip * 1e3:.2f} ms by ssh"
    yield f"token         {report.local_token * 1e3:.2f} ms here, {report.ssh_token * 1e3:.2f} ms by ssh"
    yield from promise_lines(report.promises())


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.host_losses", description=__doc__)
    parser.add_argument("--losses", type=int, default=_LOSSES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    end_within(arguments.losses * _SECONDS_EACH + _FURTHER_SECONDS)
    with tempfile.TemporaryDirectory() as home:
        found = run(arguments.losses, arguments.seed, Path(home))
    print(*lines(found), sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(found.model_dump_json(indent=2))
    sys.exit(0 if all(found.promises().values()) else 1)


if __name__ == "__main__":
    main()
