"""Completes the OpenAPI document: request bodies, which FastAPI does not see behind ``read_body``, and errors."""

import json
from collections.abc import Container, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from exo.api.http import sse
from exo.api.http.error_reply import in_envelope
from exo.api.http.errors import ErrorBody
from exo.api.http.request_record import dialect_of

_REF = "#/components/schemas/{model}"
_DESCRIPTION = """
One server with several inference engines, called runners. A router chooses the runner of each request.

* `model` is a model id or an alias. `name@runner` requires a runner.
* A field has the same effect on every runner, unless its description names runners.
* An unknown field has no effect, and the header `x-exo-warning` names it; with `exo serve --strict` it is a 400. A
  field that no runner supports for this model is a 400 that names it. An explicit null means the default. If a request
  does not set a sampling parameter, the model card decides, then the default below.
* Replies of a runner have the header `x-exo-runner` with its name and `x-exo-route` with the reason for its choice.
"""

_bodies: dict[str, type[BaseModel]] = {}
"""The bodies of routes, by their names in the document."""

_EVERYWHERE = {401: "There is no API key, or a wrong one.", 403: "This host name or web origin is not allowed."}
_OF_BODIES = {
    400: "Something about the request is wrong or cannot be done; the message names the field.",
    404: "There is no such model.",
    413: "The body is larger than 16 MiB, or holds too many values.",
    415: "The content type is not application/json, or the content encoding is not accepted.",
    429: "The model's queue is full; retry-after says when to come again.",
    500: "A fault of the server's; its log has the details.",
    503: "The model cannot be loaded, or the server is stopping; where it may be over soon, there is a retry-after.",
}
_OF_PATHS: Mapping[str, Mapping[int, str]] = {
    "/ready": {503: "No model can answer yet."},
    "/v1/route": {400: _OF_BODIES[400], 503: "No runner here can serve the model."},
}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The description of a route whose body is ``model``."""
    _bodies[model.__name__] = model
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Completes the document of ``app``."""
    app.description = _DESCRIPTION
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate())
        return generate()

    app.openapi = openapi


def _complete(document: dict[str, Any]) -> None:
    _, bodies = models_json_schema([(body, "validation") for body in _bodies.values()], ref_template=_REF)
    schemas: dict[str, Any] = document["components"]["schemas"]
    schemas.update(bodies["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)  # nothing here answers in FastAPI's own way
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["summary"] = operation.pop("description", "").rstrip(".")
            replies = operation["responses"]
            replies.pop("422", None)
            if "stream" in _fields(operation):
                media_type = "application/x-ndjson" if path.startswith("/api/") else sse.MEDIA_TYPE
                replies["200"]["content"][media_type] = {"schema": {"type": "string"}}
            replies.update(_errors(path, operation))


def _fields(operation: Mapping[str, Any]) -> Container[str]:
    if "requestBody" not in operation:
        return ()
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return _bodies[name].model_fields


def _errors(path: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    """The possible errors, each with an example in the envelope of the path's API."""
    if path == "/health":
        return {}
    found = dict(_EVERYWHERE)
    found |= _OF_BODIES if "requestBody" in operation else {}
    found |= {404: "There is none of this name."} if "parameters" in operation else {}
    found |= _OF_PATHS.get(path, {})
    return {str(status): _error(path, status, found[status]) for status in sorted(found)}


def _error(path: str, status: int, meaning: str) -> dict[str, Any]:
    error = ErrorBody(status=status, message="what is wrong", code="a_word_for_programs")
    example = in_envelope(error, dialect_of(path))
    return {"description": meaning, "content": {"application/json": {"example": json.loads(example)}}}
