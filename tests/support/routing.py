"""Cards, hosts and live runners for the router's tests, with a table of several runners."""

from collections.abc import Sequence

from exo.cards.card import UPSTREAM_BACKENDS, ModelCard
from exo.worker.host import Host
from exo.worker.protocol.events import Capabilities
from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import Need, RunnerSpec
from exo.worker.router import LiveRunner

SPECS = {
    "cuda": RunnerSpec("exo.worker.runner_cuda", ("LlamaCppCuda", "LlamaCppCpu")),
    "mlx": RunnerSpec("exo.worker.runner_mlx", ("MlxMetal", "MlxCuda", "MlxCpu"), frozenset({"logprobs"})),
    "abacus": RunnerSpec("exo.worker.runner_abacus", ("AbacusWood",), frozenset({"grammar", "logprobs"})),
}
BACKENDS = sorted({*UPSTREAM_BACKENDS, *(name for spec in SPECS.values() for name in spec.backends)})


def make_card(backends: Sequence[str] = ("LlamaCppCuda", "LlamaCppCpu"), runner: str = "auto") -> ModelCard:
    return ModelCard.from_toml(
        f"""
        model_id = "me/model"
        runner = "{runner}"
        backends = {list(backends)}
        n_layers = 2
        hidden_size = 64
        supports_tensor = false
        tasks = ["TextGeneration"]
        storage_size = {{ in_bytes = 1000 }}
        """
    )


def make_host(*backends: str, missing: Sequence[str] = ()) -> Host:
    """A host with these backends, on which the runners ``missing`` are not installed."""
    probes = {
        name: Probe(installed=False, engine=name, notes=(f"no {name} library",), remedy=f"install {name}")
        if name in missing
        else Probe(installed=True, engine=name, backends=tuple(each for each in spec.backends if each in backends))
        for name, spec in SPECS.items()
    }
    return Host("Linux", "x86_64", 2, 1 << 30, 1 << 29, (), probes)


def able(*needs: Need, backend: str = "LlamaCppCpu") -> Capabilities:
    return Capabilities(
        engine="llama.cpp",
        engine_version="1",
        backend=backend,
        context_length=4096,
        slots=4,
        vocabulary=1000,
        grammar="grammar" in needs,
        logprobs="logprobs" in needs,
        embeddings="embeddings" in needs,
        vision="vision" in needs,
    )


LIVE = LiveRunner("cuda", "cuda-1", "me/model", "Ready", slots=4, active=0, waiting=0, capabilities=able())
