"""Measures how long running streams wait while pictures are encoded and computed.

``python -m bench.pictures [--streams N] [--pictures N] [--tokens N] [--threads N]`` prints a table. A random model of
30 million parameters with a projector of 25 million generates ``--streams`` streams: first alone, then while pictures
come, each when the one before has been answered. A gap is the time between two tokens of one stream, as the program
that drives the runner reads them. It belongs to the stretch of time in which it ends.
"""

import argparse
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import get_args

from pydantic import JsonValue

from exo.bench.statistics import percentile
from exo.worker.protocol.commands import Command, Load, Text
from exo.worker.protocol.events import Deltas, Event, Failed, Finished, PrefillProgress, Status
from exo.worker.protocol.runners import RUNNERS
from exo.worker.protocol.wire import decode_event, encode
from exo.worker.runner_cuda.loading.loader import CPU_MAX_ITL_MS
from tests.support.pictures import random_picture
from tests.support.program import ask
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.projector import Kind, Sizes, write_projector

SHAPE = Shape(hidden=512, feed_forward=2048, layers=8, heads=8, kv_heads=4, head_dim=64, context_length=1 << 15)
SIZES = {
    "gemma3": Sizes(side=448, patch=14, merged=4, width=1024, feed_forward=4096, heads=16),
    "mlp": Sizes(side=448, patch=14, width=1024, feed_forward=4096, heads=16),
}
"""A picture has 64 tokens, which are computed in one step, or 1,024, which are computed like those of a prompt."""
WARM = 20
"""Tokens of each stream before the first measurement."""
QUESTION = "What does the picture show?"


@dataclass(slots=True)
class Watched:
    """A runner, and the moments at which tokens and progress of its requests were read."""

    process: subprocess.Popen[bytes]
    tokens: dict[str, list[float]] = field(default_factory=lambda: defaultdict[str, list[float]](list))
    progress: dict[str, list[float]] = field(default_factory=lambda: defaultdict[str, list[float]](list))
    ended: set[str] = field(default_factory=set[str])

    def send(self, command: Command) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(encode(command))
        self.process.stdin.flush()

    def read(self) -> Event:
        """Exits if the runner fails."""
        assert self.process.stdout is not None
        event, now = decode_event(self.process.stdout.readline()), time.perf_counter()
        match event:
            case Failed():
                raise SystemExit(event.message)
            case Deltas():
                for delta in event.items:
                    self.tokens[delta.id] += [now] * len(delta.tokens)
            case PrefillProgress():
                self.progress[event.id].append(now)
            case Finished():
                self.ended.add(event.id)
            case _:
                pass
        return event


Times = tuple[float, float]


def row(kind: str, what: str, streams: Sequence[Sequence[float]], stretches: Sequence[Times]) -> str:
    """The table's row for the gaps that end in these stretches of time. ``streams`` are the moments of tokens."""
    gaps = sorted(
        1000 * (later - earlier)
        for moments in streams
        for earlier, later in pairwise(moments)
        if any(begin <= later < end for begin, end in stretches)
    )
    shown = (f"{percentile(gaps, share):.0f}" if gaps else "-" for share in (0.5, 0.99, 1.0))
    return f"| {kind} | {what} | {len(gaps):,} | {' | '.join(shown)} |"


def measure(folder: Path, kind: Kind, args: argparse.Namespace) -> Iterator[str]:
    """Yields the table's rows, and a sentence about the pictures."""
    write_projector(folder / f"{kind}.mmproj.gguf", kind, SHAPE.hidden, SIZES[kind])
    slots = args.streams + 1
    table: dict[str, JsonValue] = {"path": str(folder / "model.gguf"), "mmproj": f"{kind}.mmproj.gguf", "slots": slots}
    table |= {"n_ctx": 8192, "kv": "split", "prefix_cache_bytes": 0}
    table |= {"threads": args.threads, "threads_batch": args.threads} if args.threads else {}
    with subprocess.Popen(RUNNERS["cuda"].command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            runner = Watched(process)
            runner.send(Load(model_id="bench/pictures", backend="LlamaCppCpu", table=table))
            while not (isinstance(event := runner.read(), Status) and event.state == "Ready"):
                pass
            names = [f"stream-{number}" for number in range(args.streams)]
            for number, name in enumerate(names):
                runner.send(ask(name, f"story {number}", seed=number, temperature=1.0, max_tokens=None))
            while any(len(runner.tokens[name]) < WARM for name in names):
                runner.read()
            began = time.perf_counter()
            while any(len(runner.tokens[name]) < WARM + args.tokens for name in names):
                runner.read()
            quiet, encoding, computing = (began, time.perf_counter()), list[Times](), list[Times]()
            for number in range(args.pictures):
                encoded = _encoding(runner, number)
                encoding.append(encoded)
                computing.append((encoded[1], time.perf_counter()))
            if runner.ended & {*names}:
                raise SystemExit("a stream came to the end of its context; use fewer pictures or tokens")
        finally:
            process.kill()
    streams = [runner.tokens[name] for name in names]
    yield row(kind, "none", streams, [quiet])
    yield row(kind, "being encoded", streams, encoding)
    yield row(kind, "being computed, with the answer", streams, computing)
    seconds = sorted(end - begin for begin, end in encoding)
    yield f"{kind}: a picture was encoded in {seconds[0]:.1f} to {seconds[-1]:.1f} s\n"


def _encoding(runner: Watched, number: int) -> Times:
    """Has a request with a picture answered. Returns when the picture was encoded: the longest time without progress,
    which includes the first of its tokens.
    """
    name = f"seen-{number}"
    prompt = Text(text=f"Here is picture {number}: "), random_picture(number, 448, 448), Text(text=QUESTION)
    runner.send(ask(name, max_tokens=8).model_copy(update={"prompt": prompt}))
    while name not in runner.ended:
        runner.read()
    return max(pairwise(runner.progress[name]), key=lambda pair: pair[1] - pair[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream without pictures")
    parser.add_argument("--threads", type=int, default=0, help="instead of the number that the runner finds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(Path(folder) / "model.gguf", SHAPE)
        print(f"streams: {args.streams}; milliseconds between two tokens; max_itl_ms is {CPU_MAX_ITL_MS}\n")
        print("| projector | pictures | gaps | median | p99 | longest |\n|---|---|---|---|---|---|", flush=True)
        told: list[str] = []
        for kind in get_args(Kind):
            if kind in SIZES:
                *rows, note = measure(Path(folder), kind, args)
                print("\n".join(rows), flush=True)
                told.append(note)
        print("\n" + "".join(told))


if __name__ == "__main__":
    main()
