"""Which models are divided among this machine and other hosts, and among which."""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, final

from exo.cards.card import ModelCard
from exo.worker.protocol.commands import Peer
from exo.worker.protocol.events import Failed
from exo.worker.protocol.remote_host import RemoteHost
from exo.worker.protocol.runners import RUNNERS
from exo.worker.supervisor.instance import RunnerInstance, settings_digest
from exo.worker.supervisor.runner_error import RunnerError

if TYPE_CHECKING:  # few servers have other hosts
    from exo.worker.supervisor.memory.remote import RemoteState

log = logging.getLogger(__name__)


@final
class Division:
    """A model is divided if its card says so or, by default, once the memory budget has refused it on this machine."""

    def __init__(self, hosts: Mapping[str, RemoteHost]) -> None:
        """``hosts`` are all that the user has named; only those with an address can have a part of a model."""
        self._hosts = hosts
        self._too_large: set[tuple[str, str, str]] = set()  # model id, runner, and digest of its settings

    def instead(self, refused: RunnerInstance, up: Mapping[str, "RemoteState"]) -> bool:
        """Whether a model that does not fit is to be divided instead, and was not. It then is from now on."""
        usable = [*self._usable(up)]
        if refused.card.divide != "auto" or refused.host or refused.peers or not usable:
            return False
        self._too_large.add((refused.model_id, refused.runner, refused.settings))
        log.info("%s does not fit here alone and is divided with %s", refused.model_id, " and ".join(usable))
        return True

    def peers(self, card: ModelCard, runner: str, up: Mapping[str, "RemoteState"], label: str) -> tuple[Peer, ...]:
        """The hosts that get a part of a model whose runner is here; none if it is not divided.

        ``label`` marks their processes. Raises ``RunnerError`` if the card names a host that cannot be used.
        """
        names = card.divide
        if names == "auto":
            known = (card.model_id, runner, settings_digest(card, runner)) in self._too_large
            names = tuple(self._usable(up)) if known else ()
        for name in names:
            if why := self._obstacle(name, up):
                message = f"the model card divides {card.model_id} among this machine and {', '.join(names)}; {why}"
                raise RunnerError(Failed(code="model_load_failed", message=message))
        return tuple(
            Peer(
                name=name,
                command=self._hosts[name].command(RUNNERS[runner].module, label=label),
                address=self._hosts[name].address,
                directories=up[name].found.directories,
            )
            for name in names
        )

    def _usable(self, up: Mapping[str, "RemoteState"]) -> Iterator[str]:
        return (name for name in self._hosts if not self._obstacle(name, up))

    def _obstacle(self, name: str, up: Mapping[str, "RemoteState"]) -> str:
        if name not in self._hosts:
            return f"there is no host {name} in hosts.toml"
        if not self._hosts[name].address:
            return f"host {name} has no address in hosts.toml"
        return "" if name in up else f"host {name} cannot be used now"
