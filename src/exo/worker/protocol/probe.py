"""Whether an engine works on this host, and what it can do: the answer of ``python -m MODULE --probe``."""

from exo.worker.protocol.messages import Message


class Device(Message):
    """One device that an engine can use. Memory in bytes; 0 if the engine does not report it."""

    name: str
    description: str = ""
    backend: str
    memory_total: int = 0
    memory_free: int = 0
    address: str = ""
    """On the PCI bus, such as "0000:c1:00.0"; empty if unknown."""


class Probe(Message):
    """Whether the engine is installed, and which card backends it can serve on this host."""

    installed: bool
    engine: str
    version: str = ""
    backends: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences about missing or limited features."""
    remedy: str = ""
    """The command that fixes it, or empty."""
