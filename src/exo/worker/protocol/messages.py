"""The contract between the server and a runner: limits, and the base of every message.

A runner is a program that reads one JSON object a line on standard input (``Command`` in ``commands.py``) and writes
one a line on standard output (``Event`` in ``events.py``). ``tests/contract`` tests these invariants on every runner:

- ``Ready`` or ``Failed`` precedes every other event but ``Estimated``.
- Each request ends with exactly one terminal event: ``Failed``, or else ``Finished``, ``Embedded``, ``Ranked`` or the
  last ``Tokenized``, according to its command. A cancelled request of any kind ends with ``Finished``.
- No line is longer than ``LINE_BYTES``. A large reply is sent in parts; a request for a larger one still is refused.
"""

from pydantic import BaseModel, ConfigDict

MAX_LOGPROBS = 20
"""The most alternatives that a request can have in a token's place."""
MAX_PROMPT_LOGPROBS = 1 << 19
"""The most log-probabilities of one prompt: its tokens and their alternatives."""
MAX_TOKENIZED = 1 << 20
"""The most tokens in the reply to one ``Tokenize``."""
LINE_BYTES = 64 << 20
"""The longest line, its end included."""
PICTURE_PIXELS = 1 << 22
"""The most pixels of a picture. The server scales larger ones down."""
PICTURES_BYTES = 48 << 20
"""The most characters of all pictures of a prompt together, in base64."""
PART_TOKENS = 4096
"""The most tokens in one part of ``Tokenized``, which the server then reads in a few milliseconds."""
PART_BYTES = 1 << 17
"""The most bytes of text in such a part, unless it is a single token's."""
PART_LOGPROBS = 512
"""The most log-probabilities in one part of ``PromptLogprobs``."""


class Message(BaseModel):
    """Frozen. Refuses unknown fields: nobody acts on a message that is understood in part."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
