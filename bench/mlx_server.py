"""Output rate of a tiny model through ``exo serve`` on MLX against ``mlx_lm.server``, both over HTTP, taking turns.

``python -m bench.mlx_server [PAIRS] [ARCHITECTURE]``: prints the ratio of each pair and the median, at 1 stream and at
8. Both servers stay up throughout, load the same folder, and stream the same prompts to the same client.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import httpx

from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.shape import Architecture

TOKENS = 512
BIAS = {"318": -100.0, "319": -100.0}
"""The twin's two end-of-generation tokens, which mlx_lm.server has no other way to forbid."""
CARD = """
model_id = "test/twin"
runner = "mlx"
backends = ["MlxMetal", "MlxCuda", "MlxCpu"]
n_layers = 2
hidden_size = 64
supports_tensor = false
tasks = ["TextGeneration"]

[storage_size]
in_bytes = 1000000

[mlx]
path = {path}
slots = 8
"""


@contextmanager
def running(command: list[str], url: str, environment: dict[str, str]) -> Generator[None]:
    """A server from the moment it answers to the end of the block."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        while True:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.TransportError:
                assert server.poll() is None, f"{command} ended"
                time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def read_stream(client: httpx.AsyncClient, url: str, model: str, prompt: str) -> int:
    """Tokens of one greedy completion, as the server counts them."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logit_bias": BIAS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and '"completion_tokens"' in line:
                tokens = int(json.loads(line[6:])["usage"]["completion_tokens"])
    return tokens


async def rate(url: str, model: str, streams: int, run: int) -> float:
    """Output tokens a second of ``streams`` requests that begin together. Each has to bring all its tokens."""
    async with httpx.AsyncClient(timeout=600) as client:
        began = time.perf_counter()
        prompts = [f"Run {run}, story {number}: once upon a time" for number in range(streams)]
        tokens = await asyncio.gather(*(read_stream(client, url, model, prompt) for prompt in prompts))
        took = time.perf_counter() - began
    assert set(tokens) == {TOKENS}, f"{url} answered with {tokens} tokens"
    return sum(tokens) / took


def compare(ours: str, theirs: str, folder: str, pairs: int) -> None:
    """Both servers in turn, first at 1 stream, then at 8."""
    for streams in (1, 8):
        ratios: list[float] = []
        for run in range(pairs + 1):
            exo = asyncio.run(rate(ours, "test/twin", streams, run))
            mlx_lm = asyncio.run(rate(theirs, folder, streams, run))
            if run == 0:
                continue  # both warm up
            ratios.append(exo / mlx_lm)
            print(f"{streams} streams: {exo:7.1f} / {mlx_lm:7.1f} tokens/s = {ratios[-1]:.2f}", flush=True)
        print(f"{streams} streams: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def main() -> None:
    """Writes the twin, starts both servers, compares."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    architecture = next(each for each in get_args(Architecture) if each == (sys.argv[2:] or ["llama"])[0])
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "twin"
        write_mlx(folder, Shape(architecture))
        cards = Path(home) / "exo" / "custom_model_cards"
        cards.mkdir(parents=True)
        (cards / "twin.toml").write_text(CARD.format(path=json.dumps(str(folder))))
        environment = {**os.environ, "XDG_DATA_HOME": home, "XDG_CACHE_HOME": home}
        ports = free_port(), free_port()
        ours, theirs = (f"http://127.0.0.1:{port}" for port in ports)
        exo = [sys.executable, "-m", "exo", "serve", "--port", str(ports[0])]
        mlx_lm = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(ports[1])]
        with running(exo, ours, environment), running(mlx_lm, theirs, environment):
            compare(ours, theirs, str(folder), pairs)


if __name__ == "__main__":
    main()
