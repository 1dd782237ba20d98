"""Pulls a file from a hub on this machine: speed beside curl, memory, and kills.

``python -m bench.pull [MIB] [PAIRS] [KILLS]``. Curl and the pull take turns and fetch the same file from the same
server process to the same disk. A pull also hashes and syncs the file, so curl is timed without and with a sync. Then
one pull is killed at random moments and resumed until the file is complete, and the server counts the bytes that it
sent. Each kill loses the content of the sockets' buffers, up to a few MiB for any size of the file.
"""

import argparse
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.pulling import PullProgram

NAME = "model-Q4_K_M.gguf"
SHARE, MEMORY_MIB, TWICE = 0.8, 100, 0.05
"""The promises: the share of curl's rate, resident memory, and the share of bytes that are sent twice."""


@contextmanager
def hub(content: Path) -> Generator[str]:
    """Runs the hub as a process, so that it does not take the pull's interpreter lock."""
    command = [sys.executable, "-m", "tests.support.hub", str(content), NAME]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


def write_content(path: Path, size: int) -> str:
    """Writes an incompressible file and returns its SHA-256."""
    digest, source = hashlib.sha256(), random.Random(6)
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 20):
            digest.update(data := source.randbytes(min(size, 1 << 20)))
            file.write(data)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def curl(url: str, directory: Path) -> tuple[float, float]:
    """Seconds for the file and the redirect, without and with a sync."""
    address = f"{url}/org/model/resolve/{httpx.get(f'{url}/api/models/org/model').json()['sha']}/{NAME}"
    target = directory / "curl"
    began = time.perf_counter()
    subprocess.run(["curl", "-sSfL", "-o", target, address], check=True)
    plain = time.perf_counter() - began
    with target.open("rb") as file:
        os.fsync(file.fileno())
    synced = time.perf_counter() - began
    target.unlink()
    return plain, synced


def pull(url: str, directory: Path, expected: str) -> tuple[float, float]:
    """Seconds from the first look at the partial file to the complete one, without Python's start; MiB of memory."""
    with PullProgram(url, directory, NAME) as program:
        program.wait_for(0)
        began = time.perf_counter()
        status, out, error = program.finish()
        took = time.perf_counter() - began
    assert status == 0, error
    target = directory / "org--model" / NAME
    assert sha256(target) == expected
    target.unlink()
    return took, int(out.split()[-1]) / 1024


def kill_often(url: str, directory: Path, size: int, expected: str, kills: int) -> tuple[int, float]:
    """The number of kills before the end, and the share of the file that the hub sent more than once."""
    before, in_time = int(httpx.get(f"{url}/sent").text), 0
    for moment in sorted(random.randrange(size) for _ in range(kills)):
        with PullProgram(url, directory, NAME) as program:
            while program.process.poll() is None and received(directory) < moment:
                time.sleep(0.001)
            in_time += program.process.poll() is None
            program.process.kill()
    with PullProgram(url, directory, NAME) as program:
        status, _, error = program.finish()
    assert status == 0, error
    assert sha256(directory / "org--model" / NAME) == expected
    return in_time, (int(httpx.get(f"{url}/sent").text) - before) / size - 1


def received(directory: Path) -> int:
    parts = [path for path in (directory / "org--model/.exo").glob("*") if "manifest" not in path.name]
    return max((path.stat().st_size for path in parts), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pull", description=__doc__)
    for name, number in (("mib", 16), ("pairs", 3), ("kills", 20)):
        parser.add_argument(name, type=int, nargs="?", default=number)
    arguments = parser.parse_args()
    mib, pairs, kills = arguments.mib, arguments.pairs, arguments.kills
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        directory = Path(scratch)
        content = directory / "content"
        expected = write_content(content, mib << 20)
        with hub(content) as url:
            plain, synced, resident = list[float](), list[float](), list[float]()
            for _ in range(pairs):
                curl_took, curl_synced = curl(url, directory)
                pull_took, memory = pull(url, directory, expected)
                plain.append(curl_took / pull_took)
                synced.append(curl_synced / pull_took)
                resident.append(memory)
                rates = " ".join(f"{mib / took:.0f}" for took in (curl_took, curl_synced, pull_took))
                print(f"MiB/s of curl, curl with sync, pull: {rates}; {memory:.0f} MiB resident")
            if pairs:
                print(
                    f"of curl's rate {statistics.median(plain):.0%} (at least {SHARE:.0%} must be), of its rate", end=""
                )
                print(
                    f" with sync {statistics.median(synced):.0%}; resident {max(resident):.0f} MiB (under {MEMORY_MIB})"
                )
            in_time, twice = kill_often(url, directory, mib << 20, expected, kills)
            print(f"killed {in_time} times before the end: the file is right, {twice:.2%} was sent twice", end="")
            print(f" (at most {TWICE:.0%})")


if __name__ == "__main__":
    main()
