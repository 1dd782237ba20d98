"""Messages of a runner program that answers once and ends.

``python -m MODULE --probe`` writes a ``Probe``: the engine's abilities on this host. ``python -m MODULE --score`` reads
a ``Score`` and writes a ``Scored`` or a ``Failed``: log-probabilities of given texts, for a comparison of engines.
"""

from collections.abc import Mapping

from exo.worker.protocol.commands import Load, Text
from exo.worker.protocol.events import Capabilities
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


class Score(Message):
    """Texts to evaluate token by token (teacher forcing), each by itself."""

    load: Load
    prompts: tuple[tuple[Text, ...] | tuple[int, ...], ...]
    directory: str
    """Prompt i's log-probabilities go to ``i.npy`` in this folder: float32 of shape (tokens, vocabulary); row j is for
    the token that follows the first j + 1."""


class Scored(Message):
    """The token ids of the texts. ``settings`` are those that rounding depends on, such as cache types."""

    tokens: tuple[tuple[int, ...], ...]
    capabilities: Capabilities
    settings: Mapping[str, str] = {}
