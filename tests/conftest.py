import os
from pathlib import Path

import pytest
from hypothesis import settings
from pydantic import JsonValue
from xdist.remote import Producer  # pyright: ignore[reportMissingTypeStubs]
from xdist.scheduler import LoadFileScheduling  # pyright: ignore[reportMissingTypeStubs]

from exo.cards.card import ModelCard, StorageSize
from exo.worker.protocol.runners import RUNNERS

settings.register_profile("untimed", deadline=None)
settings.register_profile("campaign", max_examples=5000, deadline=None)
settings.load_profile("untimed")

needs_vllm = pytest.mark.skipif(
    not Path(RUNNERS["vllm"].interpreter).exists(), reason=f"vLLM is not set up; {RUNNERS['vllm'].setup} does it"
)


class BySharedRunners(LoadFileScheduling):
    """Gives each file to a worker as a whole, and all files of the contract to one, since they share loaded runners."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "tests/contract" if file.startswith("tests/contract/") else file


@pytest.hookimpl(optionalhook=True)  # there is no such hook where pytest-xdist is switched off
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> BySharedRunners | None:
    return BySharedRunners(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The server's event loop."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO: a model with this ``load_gate`` loads until the file is opened for writing."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def fake_card(model_id: str = "fake/model", **table: JsonValue) -> ModelCard:
    """A model card for the fake runner in place of llama.cpp; ``table`` holds ``FakeOptions``."""
    return ModelCard(
        model_id=model_id,
        backends=("LlamaCppCpu",),
        storage_size=StorageSize(in_bytes=1),
        n_layers=1,
        hidden_size=1,
        supports_tensor=False,
        tasks=("TextGeneration",),
        engines={"cuda": table},
    )
