"""Takes hosts away from ``exo serve`` while eight streams run on them, and checks every token.

``python -m bench.host_losses [--ray] [--losses N] [--kinds cut node] [--seed N] [--json FILE]``. Two hosts behind
sshd, or two nodes of a Ray cluster, each in a network namespace of its own, take turns; this machine computes only the
undisturbed run. Needs root and openssh-server. Exits with status 1 if a promise is broken.
"""

import argparse
import asyncio
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
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
from tests.support.ray_nodes import RayHost, ray_of, why_no_ray
from tests.support.server import ServeProgram, write_card
from tests.support.ssh_host import SshHost, server_namespace, why_not
from tests.support.tiny import Shape, write_gguf

Loss = Literal["runner", "session", "node", "cut"]
"""SIGKILL to the runner, to its session's sshd or Ray actor, or to the node program; the cable is cut."""
_KINDS: tuple[Loss, ...] = get_args(Loss)

_TOKENS = 1500
_LOSSES = 20
_SECONDS_EACH, _FURTHER_SECONDS = 60.0, 600.0
_LONGEST_PAUSE = 1.0
_NOTICED_SECONDS = {"ssh": 4.0, "ray": 6.0}
_MODEL, _LOCAL = "moving", "here"


class HostLossReport(BaseModel):
    """Times in seconds. ``gaps`` are the longest of each loss between two tokens of a stream, by kind."""

    way: Literal["ssh", "ray"]
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
    noticed: list[float]
    """From each cut of the cable to when the server states that the host is down."""
    orphans: int
    """Processes on the hosts after the server has ended."""

    def promises(self) -> dict[str, bool]:
        most = _NOTICED_SECONDS[self.way]
        return {
            "every loss within the time limit, and under streams": self.finished,
            f"every cut noticed within {most:g} s": max(self.noticed, default=0.0) <= most,
            "no stream lost": self.streams_lost == 0 < self.streams,
            "no token lost, none doubled": self.tokens_lost == self.tokens_doubled == 0,
            "every text and usage is that of the undisturbed run": self.different == self.usage_wrong == 0,
            "no process stays on a host": self.orphans == 0,
        }


@dataclass(slots=True)
class HostLosses:
    """``hosts`` serve the streams in turn: the one that loses them is left for the other."""

    server: ServeProgram
    hosts: Sequence[SshHost]
    dice: random.Random
    undisturbed: list[WatchedStream] = field(default_factory=list[WatchedStream])
    streams: list[WatchedStream] = field(default_factory=list[WatchedStream])
    gaps: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    noticed: list[float] = field(default_factory=list[float])
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
        await until(lambda: all(host.name in up(self.server) for host in self.hosts))
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
        if kind == "cut":
            await until(lambda: host.name not in up(self.server))
            self.noticed.append(time.perf_counter() - died)
        # Tokens that were under way still come. The loss counts from when the server knows of it.
        await until(lambda: self._serving() is not host)
        noticed, streams = time.perf_counter(), [*self._in_flight()]
        await until(lambda: all(self._has_gone_on(each, noticed) for each in streams))
        self.gaps.setdefault(kind, []).append(self._gap)
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

    def _in_flight(self) -> Iterator[WatchedStream]:
        return (stream for stream in self._running.values() if stream.in_flight)


def up(server: ServeProgram) -> list[str]:
    """The hosts that a server can use."""
    text = server.client.get("/metrics").text
    return re.findall(r'^exo:host_up\{host="(.*)"\} 1\.0$', text, re.MULTILINE)


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


def write_cards(home: Path, models: Mapping[str, Sequence[JsonValue]]) -> None:
    """Writes a tiny float32 model, and a model card for each name with the hosts that serve it."""
    write_gguf(home / "tiny.gguf", Shape(context_length=2048))
    table: dict[str, JsonValue] = {"path": str(home / "tiny.gguf"), "n_ctx": 2048, "slots": STREAMS, "threads": 1}
    table |= {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
    for name, hosts in models.items():
        write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"], hosts=[*hosts], replicas=1)


def run(home: Path, kinds: Sequence[Loss], seed: int, *, ray: bool) -> HostLossReport:
    """``kinds`` in random order."""
    write_cards(home, {_LOCAL: ["local"], _MODEL: ["gpu2", "gpu3"]})
    dice = random.Random(seed)
    kinds = dice.sample(kinds, len(kinds))
    with ExitStack() as stack:
        namespace = stack.enter_context(server_namespace())
        kind = RayHost if ray else SshHost
        hosts = [kind(home, name, namespace, number) for number, name in enumerate(("gpu2", "gpu3"))]
        for host in hosts:
            stack.enter_context(host.running())
        arguments: tuple[str, ...] = ()
        if nodes := [host for host in hosts if isinstance(host, RayHost)]:
            arguments = ("--ray", stack.enter_context(ray_of(nodes)).address)
        else:
            write_hosts(home, *hosts)
        with ServeProgram(home, *arguments) as server:
            campaign = HostLosses(server, hosts, dice)
            asyncio.run(campaign.run(kinds, len(kinds) * _SECONDS_EACH))
        deadline = time.monotonic() + 30
        while (left := [each for host in hosts for each in host.processes()]) and time.monotonic() < deadline:
            time.sleep(0.1)
    return report("ray" if ray else "ssh", seed, campaign, len(left))


def report(way: Literal["ssh", "ray"], seed: int, campaign: HostLosses, orphans: int) -> HostLossReport:
    expected = {each.number: each for each in campaign.undisturbed}
    whole = [each for each in campaign.streams if each.done]
    lost = [each for each in campaign.streams if not each.done]
    found = [align(expected[each.number].ids, each.ids) for each in whole]
    return HostLossReport(
        way=way,
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
        noticed=campaign.noticed,
        orphans=orphans,
    )


def lines(report: HostLossReport) -> Iterator[str]:
    yield f"== {report.losses} losses of a host by {report.way}, seed {report.seed}"
    yield f"streams       {report.streams} whole, {report.streams_lost} lost, {report.cuts} cuts"
    yield from (f"              {each}" for each in report.errors)
    yield f"tokens        {report.tokens} delivered, {report.tokens_lost} lost, {report.tokens_doubled} doubled"
    yield f"texts         {report.different} differ; usage: {report.usage_wrong} wrong"
    for kind, gaps in report.gaps.items():
        yield f"gap, {kind:<9}{_spread(gaps)}"
    if report.noticed:
        yield f"cut noticed   {_spread(report.noticed)}"
    yield from promise_lines(report.promises())


def _spread(seconds: Sequence[float]) -> str:
    return f"{len(seconds)}: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.host_losses", description=__doc__)
    parser.add_argument("--ray", action="store_true", help="with the nodes of a Ray cluster")
    parser.add_argument("--losses", type=int, default=_LOSSES)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS, help="of losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if reason := why_not() or (arguments.ray and why_no_ray()):
        sys.exit(reason)
    end_within(arguments.losses * _SECONDS_EACH + _FURTHER_SECONDS)
    kinds: list[Loss] = [arguments.kinds[number % len(arguments.kinds)] for number in range(arguments.losses)]
    with tempfile.TemporaryDirectory() as home:
        found = run(Path(home), kinds, arguments.seed, ray=arguments.ray)
    print(*lines(found), sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(found.model_dump_json(indent=2))
    sys.exit(0 if all(found.promises().values()) else 1)


if __name__ == "__main__":
    main()
