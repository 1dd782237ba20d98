"""The OpenAPI document's request bodies, which FastAPI cannot see because ``read_body`` bounds and validates them."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """What a route adds to its description to say that it takes ``model``."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI, *models: type[BaseModel]) -> None:
    """Adds the schemas of ``models`` to the document of ``app``."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, bodies = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
            document = generate()
            document["components"]["schemas"].update(bodies["$defs"])
        return generate()

    app.openapi = openapi
