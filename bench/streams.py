"""Concurrent streams of the demo model through ``exo serve`` against llama.cpp's bare decode loop, taking turns.

``python bench/streams.py [PAIRS]``: prints how soon the server listens and what it weighs, the ratio of each pair and
their median, and how soon a slot is free after its client left in the middle of a 2,000-token prompt.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from exo.config import Settings

MODEL = "gemma-3-270m"
STREAMS, TOKENS = 16, 64


@dataclass(slots=True)
class Stream:
    """Arrival times of one stream's text, in seconds, and what its end said."""

    times: list[float]
    completion_tokens: int
    done: bool


def start_server(home: Path, *arguments: str) -> tuple[subprocess.Popen[str], str, float]:
    """The process, its URL and the seconds until it listened."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XDG_DATA_HOME": str(home)}
    command = [
        sys.executable,
        "-m",
        "exo",
        "serve",
        "--port",
        "0",
        "--models-dir",
        str(Settings.load().models_directory),
    ]
    server = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert server.stdout is not None
    url = server.stdout.readline().split()[4]
    httpx.get(f"{url}/health")
    return server, url, time.perf_counter() - began


def megabytes(server: subprocess.Popen[str]) -> float:
    """Resident memory of the server process, its runners not counted."""
    return psutil.Process(server.pid).memory_info().rss / 1e6


def wait_until_ready(url: str) -> None:
    """Returns when a model can answer."""
    while httpx.get(f"{url}/ready", timeout=60).status_code != 200:
        time.sleep(0.2)


async def read_stream(url: str, number: int) -> Stream:
    """One greedy stream of ``TOKENS`` tokens.

    Reads bytes and parses them only afterwards: what a client costs is not what is measured, and here it shares the
    cores with the engine.
    """
    body = {
        "model": MODEL,
        "prompt": f"Story number {number}: once upon a time",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload = json.dumps(body).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
    received: list[tuple[float, bytes]] = []
    while data := await reader.read(1 << 16):
        received.append((time.perf_counter(), data))
    writer.close()
    text = b"".join(data for _, data in received).decode()
    usage = text.rpartition('"completion_tokens":')[2]
    return Stream(
        times=[moment for moment, data in received for _ in range(data.count(b'"finish_reason":null'))],
        completion_tokens=int(usage[: usage.index(",")]),
        done="data: [DONE]" in text,
    )


async def through_server(url: str) -> tuple[float, float]:
    """Output tokens a second while all streams decode, and over the whole run. Every stream must be complete."""
    began = time.perf_counter()
    streams = await asyncio.gather(*(read_stream(url, number) for number in range(STREAMS)))
    ended = time.perf_counter()
    assert all(stream.done and stream.completion_tokens == TOKENS for stream in streams), "a stream is incomplete"
    all_decoding = max(stream.times[0] for stream in streams)
    first_ended = min(stream.times[-1] for stream in streams)
    tokens = sum(all_decoding < moment <= first_ended for stream in streams for moment in stream.times)
    return tokens / (first_ended - all_decoding), STREAMS * TOKENS / (ended - began)


def bare_loop() -> tuple[float, float]:
    """The same two rates of llama.cpp alone, in a process of its own."""
    model = next((Settings.load().models_directory / "google--gemma-3-270m").glob("*.gguf"))
    command = [sys.executable, str(Path(__file__).parent / "raw_loop.py"), str(model), str(STREAMS), str(TOKENS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    rates = json.loads(done.stdout)
    return rates["decode"], rates["whole"]


def compare_rates(home: Path, pairs: int) -> None:
    """Server and bare loop in turn."""
    server, url, _ = start_server(home, "--load", MODEL)
    wait_until_ready(url)
    asyncio.run(through_server(url))
    decode: list[float] = []
    whole: list[float] = []
    for _ in range(pairs):
        ours, bare = asyncio.run(through_server(url)), bare_loop()
        decode.append(ours[0] / bare[0])
        whole.append(ours[1] / bare[1])
        print(
            f"decoding {ours[0]:6.1f} / {bare[0]:6.1f} tokens/s = {decode[-1]:.3f}    "
            f"with prompts {ours[1]:6.1f} / {bare[1]:6.1f} = {whole[-1]:.3f}",
            flush=True,
        )
    for name, ratios in (("decoding", decode), ("with prompts", whole)):
        print(f"{name}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"server memory after {(pairs + 1) * STREAMS} streams: {megabytes(server):.0f} MB")
    server.terminate()
    server.wait()


def start_time(home: Path, runs: int) -> None:
    """Seconds to listening without a model."""
    seconds: list[float] = []
    memory = 0.0
    for _ in range(runs):
        server, _, took = start_server(home)
        seconds.append(took)
        memory = megabytes(server)
        server.terminate()
        server.wait()
    print(f"start to first answer of /health: median {statistics.median(seconds):.2f} s; memory {memory:.0f} MB")


def cancel_time(home: Path, runs: int) -> None:
    """A model with one slot, whose client leaves during a prompt of some 2,000 tokens while the next one waits."""
    cards = home / "exo" / "custom_model_cards"
    cards.mkdir(parents=True)
    built_in = Path(__file__).parent.parent / "src/exo/cards/built_in/gemma-3-270m.toml"
    (cards / "one-slot.toml").write_text(built_in.read_text().replace("slots = 16", "slots = 1"))
    server, url, _ = start_server(home, "--load", MODEL)
    wait_until_ready(url)
    seconds: list[float] = []
    alone: list[float] = []
    for run in range(runs):
        body = {"model": MODEL, "prompt": f"{run} " + "word " * 2000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            assert reply.status_code == 200
            time.sleep(0.3 + 0.1 * run)
        for results in (seconds, alone):
            began = time.perf_counter()
            httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "The", "max_tokens": 1}, timeout=60)
            results.append(time.perf_counter() - began)
    print(f"one token after a client left a 2,000-token prompt: median {statistics.median(seconds):.2f} s, ", end="")
    print(f"largest {max(seconds):.2f} s (with nothing before it: {statistics.median(alone):.2f} s)")
    server.terminate()
    server.wait()


def main() -> None:
    """All measurements, one after the other."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        start_time(Path(folder), 5)
        compare_rates(Path(folder), pairs)
        cancel_time(Path(folder), 9)


if __name__ == "__main__":
    main()
