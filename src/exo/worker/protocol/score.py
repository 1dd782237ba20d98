"""Log-probabilities of given texts, for a comparison of engines.

``python -m MODULE --score`` reads a ``Score`` and writes a ``Scored`` or a ``Failed``, and ends.
"""

from collections.abc import Mapping

from exo.worker.protocol.commands import Load, Text
from exo.worker.protocol.events import Capabilities
from exo.worker.protocol.messages import Message


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
