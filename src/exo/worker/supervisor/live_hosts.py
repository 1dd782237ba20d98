"""The machines on which a server runs its runners: this one, and the other hosts that are up."""

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, final

from exo.cards.card import ModelCard
from exo.worker.protocol.commands import Load, Peer
from exo.worker.protocol.events import Failed
from exo.worker.protocol.remote_host import RemoteHost, host_of
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import Route
from exo.worker.supervisor.instance import RunnerInstance, settings_digest
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.runner_error import RunnerError

if TYPE_CHECKING:  # few servers have other hosts
    from exo.worker.supervisor.memory.remote import RemoteState
    from exo.worker.supervisor.node_messages import HostFound

log = logging.getLogger(__name__)


@final
class LiveHosts:
    """A model is divided if its card says so or, by default, once the memory budget has refused it on this machine."""

    def __init__(
        self,
        hosts: Iterable[RemoteHost],
        commands: Mapping[str, Sequence[str]],
        models_directories: tuple[str, ...] = (),
        prefixes: str = "",
    ) -> None:
        """``hosts`` are all that the user has named; only those with an address can have a part of a model.

        ``commands`` by runner name, ``models_directories`` and ``prefixes``, see ``Load``, are this machine's.
        """
        self.server_id = secrets.token_hex(6)  # marks the processes of this server on other hosts
        self._hosts = {each.name: each for each in hosts}
        self._commands = commands
        self._models_directories = models_directories
        self._prefixes = prefixes
        self.up: dict[str, RemoteState] = {}  # only ``add`` and ``remove`` write it
        self._too_large: set[tuple[str, str, str]] = set()  # model id, runner, and digest of its settings

    def add(self, name: str, found: "HostFound") -> None:
        """A host can be used, or has been probed again."""
        from exo.worker.supervisor.memory.remote import RemoteState

        self.up[name] = RemoteState(self._hosts[name], found, dict(found.memory))

    def remove(self, name: str) -> None:
        """A host is lost."""
        self.up.pop(name, None)

    def beside(self, capacity: Memory) -> Memory:
        """The part of a capacity that is on this machine, with the memory of the hosts that are up."""
        devices = {each: size for each, size in capacity.devices.items() if not host_of(each)}
        for each in self.up.values():
            devices |= each.accounts
        return Memory(capacity.host, devices)

    def command(self, runner: str, host: str, instance: str = "") -> Sequence[str]:
        """The command line of a runner on a host; ``instance`` marks the process there."""
        if not host:
            return self._commands[runner]
        label = f"{self.server_id}:{instance}" if instance else ""
        return self._hosts[host].command(RUNNERS[runner].module, label=label)

    def load(self, route: Route, card: ModelCard, instance: str = "") -> Load:
        """What the runner of ``instance`` is to load. Raises ``RunnerError``."""
        remote = self.up.get(route.host)
        return Load(
            model_id=card.model_id,
            backend=route.backend,
            table=card.engines.get(route.runner, {}),
            directories=self._models_directories if remote is None else remote.found.directories,
            prefixes=self._prefixes if remote is None else remote.found.prefixes,
            tasks=card.tasks,
            peers=self.peers(card, route.runner, instance) if self._hosts and not route.host else (),
        )

    def pid(self, instance: RunnerInstance) -> int | None:
        """The process id of an instance on its host, if that is known."""
        if not instance.host:
            return instance.process.pid
        use = self.up[instance.host].runners.get(instance.id) if instance.host in self.up else None
        return None if use is None else use.pid

    def divide(self, refused: RunnerInstance) -> bool:
        """Whether a model that does not fit is to be divided instead, and was not. It then is from now on."""
        usable = [*self._usable()]
        if refused.card.divide != "auto" or refused.host or refused.peers or not usable:
            return False
        self._too_large.add((refused.model_id, refused.runner, refused.settings))
        log.info("%s does not fit here alone and is divided with %s", refused.model_id, " and ".join(usable))
        return True

    def peers(self, card: ModelCard, runner: str, instance: str) -> tuple[Peer, ...]:
        """The hosts that get a part of a model whose runner is here; none if it is not divided.

        Raises ``RunnerError`` if the card names a host that cannot be used.
        """
        names = card.divide
        if names == "auto":
            known = (card.model_id, runner, settings_digest(card, runner)) in self._too_large
            names = tuple(self._usable()) if known else ()
        for name in names:
            if why := self._obstacle(name):
                message = f"the model card divides {card.model_id} among this machine and {', '.join(names)}; {why}"
                raise RunnerError(Failed(code="model_load_failed", message=message))
        return tuple(
            Peer(
                name=name,
                command=tuple(self.command(runner, name, instance)),
                address=self._hosts[name].address,
                directories=self.up[name].found.directories,
            )
            for name in names
        )

    def _usable(self) -> Iterator[str]:
        return (name for name in self._hosts if not self._obstacle(name))

    def _obstacle(self, name: str) -> str:
        if name not in self._hosts:
            return f"there is no host {name} in hosts.toml"
        if not self._hosts[name].address:
            return f"host {name} has no address in hosts.toml"
        return "" if name in self.up else f"host {name} cannot be used now"
