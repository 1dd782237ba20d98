"""What two of the loop's devices bring, each against the same runner without it, on one GGUF.

``python bench/prefix.py MODEL.gguf shared|long [--scale S] [--repeats N]``: a stem that 4 streams share against stems
of their own; a prompt of 4,000 tokens among 8 running streams with the step's time bounded and without. ``--scale``
shrinks lengths, for a trial. The runner is driven directly, by the messages of ``exo.worker.protocol.messages``. The
two kinds take turns; medians are printed. ``bench/speculation.py`` measures guessing ahead.
"""

import argparse
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import JsonValue

from exo.worker.protocol.messages import (
    Deltas,
    Failed,
    Finished,
    Generate,
    Load,
    Message,
    SamplingParams,
    Shutdown,
    Status,
    Text,
)
from exo.worker.protocol.runners import RUNNERS
from exo.worker.protocol.wire import decode_event, encode

Table = dict[str, JsonValue]


@dataclass(slots=True)
class Stream:
    """When a request was sent, when its tokens came, in seconds, and how it ended."""

    sent: float
    times: list[float] = field(default_factory=list[float])
    tokens: list[int] = field(default_factory=list[int])
    end: Finished | None = None

    @property
    def first(self) -> float:
        """Time to first token."""
        return self.times[0] - self.sent

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class Runner:
    """One runner process with a model."""

    def __init__(self, path: str, **table: JsonValue) -> None:
        command = [sys.executable, "-m", RUNNERS["cuda"].module]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._streams: dict[str, Stream] = {}
        self._ready = threading.Event()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        options: Table = {"path": path, "n_gpu_layers": 0, **table}
        self._send(Load(model_id="bench", backend="LlamaCppCpu", table=options))
        self._ready.wait()

    def _send(self, message: Message) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(encode(message))
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = decode_event(line)
            now = time.perf_counter()
            with self._changed:
                match event:
                    case Status(state="Ready"):
                        self._ready.set()
                    case Deltas(items=items):
                        for delta in items:
                            self._streams[delta.id].times += [now] * len(delta.tokens)
                            self._streams[delta.id].tokens += delta.tokens
                    case Finished(id=request):
                        self._streams[request].end = event
                    case Failed(message=message):
                        sys.exit(message)
                    case _:
                        pass
                self._changed.notify_all()

    def start(self, prompt: list[int] | str, tokens: int) -> Stream:
        """Sends a greedy request, of tokens or of text."""
        request = Generate(
            id=f"r{len(self._streams)}",
            prompt=(Text(text=prompt),) if isinstance(prompt, str) else tuple(prompt),
            sampling=SamplingParams(seed=0, temperature=0),
            max_tokens=tokens,
            ignore_eos=True,
        )
        stream = self._streams[request.id] = Stream(time.perf_counter())
        self._send(request)
        return stream

    def wait(self, done: Callable[[], bool]) -> None:
        """Returns when ``done()``."""
        with self._changed:
            self._changed.wait_for(done)

    def finish(self, streams: list[Stream]) -> None:
        """Waits for the ends of streams."""
        self.wait(lambda: all(stream.end is not None for stream in streams))

    def stop(self) -> None:
        """Ends the process."""
        self._send(Shutdown())
        self._process.wait()


def words(random_source: random.Random, count: int) -> list[int]:
    """Token ids that look like text to a cache: any, but not the same twice in a row."""
    return [random_source.randrange(1000, 20_000) for _ in range(count)]


def shared(path: str, scale: float, repeats: int) -> dict[str, list[float]]:
    """Times to first token of 4 streams whose 530-token stem is known, and of 4 with new stems of that length."""
    source, results = random.Random(1), defaultdict[str, list[float]](list)
    runner, length = Runner(path, slots=4, n_ctx=2048), int(530 * scale)
    stem = words(source, length)
    runner.finish([runner.start(stem + words(source, 10), 4)])
    for _ in range(repeats):
        for kind in ("shared", "own"):
            prompts = [(stem if kind == "shared" else words(source, length)) + words(source, 10) for _ in range(4)]
            streams = [runner.start(prompt, 16) for prompt in prompts]
            runner.finish(streams)
            results[f"time to first token, {kind} stems, s"].append(statistics.median(s.first for s in streams))
    runner.stop()
    return results


def long(path: str, scale: float, repeats: int) -> dict[str, list[float]]:
    """Gaps between tokens of 8 streams while a long prompt is computed, and its time to first token."""
    source, results = random.Random(2), defaultdict[str, list[float]](list)
    tables: dict[str, Table] = {
        "bounded": {},
        "unbounded": {"max_itl_ms": 60_000, "n_batch": 2048, "n_ubatch": 512},
    }
    for _ in range(repeats):
        for kind, table in tables.items():
            runner = Runner(path, slots=9, n_ctx=8192, **table)
            streams = [runner.start(words(source, 40), 2000) for _ in range(8)]
            runner.wait(lambda streams=streams: all(len(stream.times) > 5 for stream in streams))
            prompt = runner.start(words(source, int(4000 * scale)), 2)
            runner.finish([prompt])
            gaps = sorted(
                after - max(before, prompt.sent)
                for stream in streams
                for before, after in zip(stream.times, stream.times[1:], strict=False)
                if after > prompt.sent and before < prompt.times[0]
            )
            results[f"gap between tokens, 99th percentile, {kind}, s"].append(gaps[int(0.99 * (len(gaps) - 1))])
            results[f"gap between tokens, median, {kind}, s"].append(statistics.median(gaps))
            results[f"time to first token of the long prompt, {kind}, s"].append(prompt.first)
            runner.stop()
    return results


def main() -> None:
    """One of the two, and a line for each figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("what", choices=("shared", "long"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    measure = {"shared": shared, "long": long}[arguments.what]
    for name, values in measure(arguments.path, arguments.scale, arguments.repeats).items():
        print(f"{name}: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
