"""Helpers for the tests of pulling: a model card, a pull from a local hub, and a pull as a program that can be killed.

``python -m tests.support.pulling HUB DIRECTORY FILE [LIMIT]`` pulls FILE of org/model, prints the number of bytes at
each report of progress, and its peak memory in KiB at the end. LIMIT is the size of the largest file that it may write.
"""

import asyncio
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import JsonValue

from exo.cards.card import ModelCard
from exo.config import HubAccess
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.hub import Hub
from exo.store.progress import DownloadProgress
from exo.store.pull import plan, pull
from exo.store.store import OnDisk, Store
from tests import ROOT
from tests.conftest import fake_card
from tests.support.hub import REPO
from tests.support.server import inherited

BACKOFF_SECONDS = 0.01


def gguf_card(file: str, model_id: str = "test/model", **table: JsonValue) -> ModelCard:
    return fake_card(model_id, repo=REPO, file=file, **table)


def mlx_card(repo: str = REPO) -> ModelCard:
    """A card like upstream's, whose model id is the repository."""
    return fake_card(repo).model_copy(update={"backends": ("MlxCpu",), "engines": {}})


def hub_at(url: str, token: str | None = None) -> Hub:
    return Hub(HubAccess(url, token), backoff_seconds=BACKOFF_SECONDS)


def ignore(_: DownloadProgress) -> None:
    pass


async def pull_card(
    card: ModelCard,
    store: Store,
    hub: Hub,
    runner: str = "cuda",
    quant: str | None = None,
    report: Callable[[DownloadProgress], None] = ignore,
) -> OnDisk:
    return await pull(await plan(Source.of(card, runner, quant), hub), store, hub, report)


class PullProgram:
    """A pull of ``file`` in a process of its own."""

    def __init__(self, url: str, directory: Path, file: str, limit: int | None = None) -> None:
        command = [sys.executable, "-m", "tests.support.pulling", url, str(directory), file]
        command += [str(limit)] if limit is not None else []
        root = ROOT
        self.process = subprocess.Popen(
            command, cwd=root, env=inherited(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, done: int) -> None:
        """Waits until so many bytes have come."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if int(line) >= done:
                return
        raise AssertionError(self.finish())

    def finish(self) -> tuple[int, str, str]:
        """Exit status, what else it printed, and its error."""
        out, error = self.process.communicate(timeout=60)
        return self.process.returncode, out, error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    if len(sys.argv) > 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
    store, hub = Store([Path(sys.argv[2])]), hub_at(sys.argv[1])
    try:
        show: Callable[[DownloadProgress], None] = lambda progress: print(progress.done, flush=True)  # noqa: E731
        asyncio.run(pull_card(gguf_card(sys.argv[3]), store, hub, report=show))
    except PullError as error:
        sys.exit(f"{error.code}: {error}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


if __name__ == "__main__":
    main()
