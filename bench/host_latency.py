"""Measures what ssh and Ray add to the time of a token, beside a runner on this machine.

``python -m bench.host_latency [--ray] [--rounds N] [--json FILE]``. The hosts are network namespaces of this machine.
Needs root and openssh-server; ``--ray`` also needs Ray. Takes about a minute. Exits with status 1 if a promise is
broken.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel

from bench.fault_report import promise_lines
from bench.host_losses import body, until, up, write_cards
from bench.servers import end_within
from bench.streams import WatchedStream, client_of
from tests.support.hosts import write_hosts
from tests.support.ray_nodes import RayHost, ray_of, why_no_ray
from tests.support.server import ServeProgram
from tests.support.ssh_host import SshHost, server_namespace, why_not

_ROUNDS = 1000
_STREAMS, _TOKENS = 5, 1500
_SECONDS = 600.0
_LOCAL, _SSH, _RAY = "here", "ssh", "ray"
_MOST_ADDED = {_SSH: 0.5e-3, _RAY: 1e-3}


class HostLatency(BaseModel):
    """Medians in seconds, by where the runner is."""

    rounds: int
    round_trip: dict[str, float]
    """The time of a request for one token whose prompt is cached. Its path is that of a token, and the way there."""
    token: dict[str, float]
    """The time between two tokens of a lone stream."""

    def added(self, where: str) -> float:
        return self.round_trip[where] - self.round_trip[_LOCAL]

    def promises(self) -> dict[str, bool]:
        return {
            f"{where} adds at most {most * 1e3:g} ms to a round trip at the median": self.added(where) <= most
            for where, most in _MOST_ADDED.items()
            if where in self.round_trip
        }


async def measure(url: str, places: Sequence[str], rounds: int) -> HostLatency:
    """Asks each place in turn."""
    client = client_of(url)
    trips = {each: list[float]() for each in places}
    intervals = {each: list[float]() for each in places}
    for _ in range(rounds):
        for place in places:
            await (stream := WatchedStream(0, 1)).read(client, body(place, 0))
            assert stream.done, stream.error
            trips[place].append(stream.seconds)
    for _ in range(_STREAMS):
        for place in places:
            moments: list[float] = []
            await WatchedStream(0, _TOKENS).read(client, body(place, 0), partial(_note_time, moments))
            intervals[place] += [after - before for before, after in pairwise(moments)]
    round_trip, token = ({each: statistics.median(found[each]) for each in places} for found in (trips, intervals))
    return HostLatency(rounds=rounds, round_trip=round_trip, token=token)


def _note_time(moments: list[float]) -> None:
    moments.append(time.perf_counter())


def run(home: Path, rounds: int, *, ray: bool) -> HostLatency:
    places = {_LOCAL: "local", _SSH: "gpu2"} | ({_RAY: "gpu3"} if ray else {})
    write_cards(home, {name: [host] for name, host in places.items()})
    with ExitStack() as stack:
        namespace = stack.enter_context(server_namespace())
        host = SshHost(home, "gpu2", namespace, 0)
        stack.enter_context(host.running())
        write_hosts(home, host)
        arguments: tuple[str, ...] = ()
        if ray:
            node = RayHost(home, "gpu3", namespace, 1)
            stack.enter_context(node.running())
            arguments = ("--ray", stack.enter_context(ray_of([node])).address)
        server = stack.enter_context(ServeProgram(home, *arguments))
        asyncio.run(until(lambda: {*up(server)} >= {*places.values()} - {"local"}))
        return asyncio.run(measure(server.url, [*places], rounds))


def lines(found: HostLatency) -> Iterator[str]:
    for place, trip in found.round_trip.items():
        yield (
            f"{place:<5} round trip {trip * 1e3:.3f} ms, {found.added(place) * 1e3:+.3f} ms; "
            f"between tokens {found.token[place] * 1e3:.3f} ms"
        )
    yield from promise_lines(found.promises())


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.host_latency", description=__doc__)
    parser.add_argument("--ray", action="store_true", help="also a node of a Ray cluster")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if reason := why_not() or (arguments.ray and why_no_ray()):
        sys.exit(reason)
    end_within(_SECONDS)
    with tempfile.TemporaryDirectory() as home:
        found = run(Path(home), arguments.rounds, ray=arguments.ray)
    print(*lines(found), sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(found.model_dump_json(indent=2))
    sys.exit(0 if all(found.promises().values()) else 1)


if __name__ == "__main__":
    main()
