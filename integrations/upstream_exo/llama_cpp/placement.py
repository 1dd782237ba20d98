"""The choice of an engine for a model, by the router that also chooses the runner of each request. Pure."""

from collections.abc import Iterable

from exo.cards.card import ModelCard as RouterCard
from exo.cards.card import StorageSize
from exo.shared.models.model_cards import ModelCard
from exo.shared.types.backends import Backend
from exo.shared.types.worker.instances import InstanceMeta
from exo.worker.host import Host
from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import Refusal, route

# Upstream has no instance for vLLM.
KINDS = {"mlx": InstanceMeta.MlxRing, "cuda": InstanceMeta.LlamaCpp}


def choose(asked: InstanceMeta, card: ModelCard, present: Iterable[Backend]) -> tuple[InstanceMeta, Backend]:
    """Returns the kind of instance for nodes with these backends, and the first backend of the card that serves it.

    It is ``asked`` if the model card lists a backend of it. Otherwise the order of the card decides, so that clients,
    which ask for MLX by default, need not name an engine. Raises ValueError with the router's reason.
    """
    has = {backend.value for backend in present}
    served = {runner: tuple(each for each in RUNNERS[runner].backends if each in has) for runner in KINDS}
    probes = {runner: Probe(installed=bool(here), engine=runner, backends=here) for runner, here in served.items()}
    wanted = RouterCard(
        model_id=str(card.model_id),
        backends=tuple(backend.value for backend in card.backends),
        storage_size=StorageSize(in_bytes=card.storage_size.in_bytes),
        n_layers=card.n_layers,
        hidden_size=card.hidden_size,
        supports_tensor=card.supports_tensor,
        tasks=("TextGeneration",),
    )
    runner = "cuda" if asked == InstanceMeta.LlamaCpp else "mlx"
    wish = runner if set(RUNNERS[runner].backends) & set(wanted.backends) else None
    chosen = route(wish, wanted, Host("", "", 0, 0, 0, (), probes), (), {})
    if isinstance(chosen, Refusal):
        raise ValueError(chosen.message)
    return asked if chosen.runner == runner else KINDS[chosen.runner], Backend(chosen.backend)
