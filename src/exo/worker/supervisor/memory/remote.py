"""Remote hosts in the memory budget: there, RAM and devices have accounts named "gpu2/memory" and "gpu2/CUDA0"."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.protocol.remote_host import RemoteHost, account
from exo.worker.supervisor.memory.memory import HOST, UNKNOWN, Memory
from exo.worker.supervisor.node_messages import HostFound, HostUsage, RunnerUse


@dataclass(slots=True)
class RemoteState:
    """A remote host that is up."""

    host: RemoteHost
    found: HostFound
    capacity: dict[str, int]
    """Bytes that all runners may take now, by the host's own names."""
    runners: Mapping[str, RunnerUse] = field(default_factory=dict[str, RunnerUse])
    """By instance."""
    _loaded: Set[str] = frozenset()
    """The instances that had loaded at the last measurement."""

    @property
    def accounts(self) -> dict[str, int]:
        """The capacity by account of the budget."""
        return {account(self.host.name, device): size for device, size in self.capacity.items()}

    def update(
        self, usage: HostUsage, reserved: Mapping[str, Memory], loaded: Set[str] = frozenset()
    ) -> dict[str, Mapping[str, int]]:
        """Takes a measurement, and returns by account the memory of each ``loaded`` instance, where it is known.

        ``reserved`` are the reservations by instance. A device keeps its capacity if the driver does not report there
        the memory of a runner that has some.
        """
        self.runners = usage.runners
        for device, free in usage.free.items():
            name, ours = account(self.host.name, device), 0
            for instance, use in usage.runners.items():
                has = use.host if device == HOST else (use.devices or {}).get(device)
                if has is None and instance in reserved and reserved[instance].devices.get(name):
                    break
                ours += has or 0
            else:
                most = self.found.memory.get(device, 0)
                self.capacity[device] = min(most, free + ours) if device == HOST else free + ours
        both = loaded & self._loaded  # the first measurement may have begun before the load had ended
        self._loaded = loaded
        return {each: sizes for each in both if (sizes := self.measured(each)) is not None}

    def measured(self, instance: str) -> Mapping[str, int] | None:
        """The memory of a runner by account; None if it is not known everywhere."""
        use = self.runners.get(instance)
        if use is None or (use.devices is None and len(self.capacity) > 1):
            return None
        sizes = {HOST: use.host, **(use.devices or {})}
        return {account(self.host.name, device): size for device, size in sizes.items()}

    def estimate(self, estimated: Estimated) -> Estimated:
        """An estimate of a runner there, by account of the budget."""
        first = next((device for device in self.capacity if device != HOST), UNKNOWN)

        def moved(option: LoadOption) -> LoadOption:
            devices = _joined(self.host.name, option.host, option.device, first, option.devices)
            later = _joined(self.host.name, option.later_host, option.later_device, first, option.later_devices)
            none = {"host": 0, "device": 0, "later_host": 0, "later_device": 0}
            return option.model_copy(update={**none, "devices": devices, "later_devices": later})

        changed = {name: tuple(map(moved, getattr(estimated, name))) for name in ("choices", "remedies", "longer")}
        return estimated.model_copy(update=changed)


def _joined(host: str, ram: int, device: int, first: str, devices: Mapping[str, int]) -> dict[str, int]:
    sizes = {HOST: ram, **devices}
    if device:
        sizes[first] = sizes.get(first, 0) + device
    return {account(host, name): size for name, size in sizes.items()}
