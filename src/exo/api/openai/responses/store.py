"""A bounded store, in memory, of responses that later requests may continue."""

from collections import OrderedDict
from dataclasses import dataclass, field

from pydantic import JsonValue
from pydantic_core import to_json

from exo.api.http.errors import ApiError
from exo.serving.pictures.prompt_pictures import Given, GivenPicture

MAX_RESPONSES = 10_000
MAX_BYTES = 64 << 20
"""The maximum size of all responses as JSON."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """``body`` is the response as sent, ``input`` the items of its request, ``messages`` the whole conversation.

    ``pictures`` are those of both, by the marks in their texts.
    """

    body: dict[str, JsonValue]
    input: list[JsonValue]
    messages: tuple[dict[str, JsonValue], ...]
    pictures: Given = field(default_factory=dict[str, GivenPicture])

    def items(self) -> dict[str, JsonValue]:
        """Its input and output items by their ids."""
        output = self.body.get("output")
        items = [*self.input, *(output if isinstance(output, list) else ())]
        return {str(item["id"]): item for item in items if isinstance(item, dict) and "id" in item}


class ResponseStore:
    """Keeps the responses that were made or read last."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._items: dict[str, tuple[str, JsonValue]] = {}
        """Input and output items by their ids, each with the id of its response."""
        self._bytes = 0

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Stores a response. Deletes the oldest ones if there is no room for all."""
        size = len(to_json(response))
        self._responses[response_id] = (response, size)
        self._bytes += size
        self._items.update({identity: (response_id, item) for identity, item in response.items().items()})
        while self._bytes > MAX_BYTES or len(self._responses) > MAX_RESPONSES:
            self._forget(next(iter(self._responses)))

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """Raises ``ApiError``: 404, or 400 if a request's ``param`` names the response."""
        if response_id not in self._responses:
            message = f"no response {response_id[:80]!r} is in memory; old ones make room for new ones"
            if param is None:
                raise ApiError(404, message, code="response_not_found")
            raise ApiError(400, f"{param}: {message}", code="previous_response_not_found", param=param)
        self._responses.move_to_end(response_id)
        return self._responses[response_id][0]

    def delete(self, response_id: str) -> None:
        """Raises ``ApiError`` 404."""
        self.get(response_id)
        self._forget(response_id)

    def item(self, item_id: str, param: str) -> tuple[JsonValue, Given]:
        """An input or output item of a stored response, and the response's pictures. Raises ``ApiError`` 400."""
        if item_id not in self._items:
            message = f"{param}: no item {item_id[:80]!r} is in memory; old ones make room for new ones"
            raise ApiError(400, message, code="item_not_found", param=param)
        response_id, item = self._items[item_id]
        return item, self._responses[response_id][0].pictures

    def _forget(self, response_id: str) -> None:
        response, freed = self._responses.pop(response_id)
        self._bytes -= freed
        for identity in response.items():
            if self._items.get(identity, ("",))[0] == response_id:
                del self._items[identity]
