"""Which instance has computed the beginning of which prompt, so that a request can go where its prefix is cached."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import final

from pydantic_core import to_json

from exo.serving.request import Conversation, Infill, Prompt

_KEPT = 1 << 14
"""Beginnings of prompts that are remembered."""
_SHORTEST = 1 << 10
"""Characters or tokens of the shortest beginning of a text. Each longer one has twice as many."""


def prefix_keys(model_id: str, prompts: Sequence[Prompt]) -> tuple[bytes, ...]:
    """A key for each beginning of the first prompt that another prompt may share, the shortest first."""
    if not prompts:
        return ()
    digest = hashlib.blake2b(model_id.encode(), digest_size=16)
    keys: list[bytes] = []
    for part in _parts(prompts[0]):
        digest.update(len(part).to_bytes(8, "big") + part)
        keys.append(digest.copy().digest())
    return tuple(keys)


def _parts(prompt: Prompt) -> Iterator[bytes]:
    match prompt:
        case Conversation():
            tools = b"".join(tool.name.encode() + to_json(tool.parameters) for tool in prompt.tools)
            first, *others = map(to_json, prompt.messages)
            yield tools + first
            yield from others
        case Infill():
            yield from _parts(prompt.prefix)
        case _:
            begin, end = 0, _SHORTEST
            while begin < len(prompt):
                yield to_json(prompt[begin:end])
                begin, end = end, 2 * end


@final
class PrefixAffinity:
    """Remembers the last instance for each beginning of a prompt. The oldest are forgotten."""

    def __init__(self) -> None:
        self._instances: OrderedDict[bytes, str] = OrderedDict()

    def find(self, keys: Sequence[bytes]) -> str | None:
        """The instance that has computed the longest of these beginnings."""
        return next((found for key in reversed(keys) if (found := self._instances.get(key)) is not None), None)

    def note(self, keys: Sequence[bytes], instance: str) -> None:
        """An instance computes these beginnings now."""
        for key in keys:
            self._instances[key] = instance
            self._instances.move_to_end(key)
        while len(self._instances) > _KEPT:
            self._instances.popitem(last=False)
