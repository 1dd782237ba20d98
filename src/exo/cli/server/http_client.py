"""The HTTP client of the commands that ask the running server."""

import json
import ssl
from collections.abc import Mapping
from typing import cast

import httpx
from pydantic import JsonValue

from exo.config import Settings
from exo.exit_code import CommandError, ExitCode

_SECONDS = 60.0
_HEALTH_TIMEOUT = httpx.Timeout(30, connect=2)
"""A server that accepts a connection is there, even if the machine is too busy for an answer within seconds. Taken for
absent, its model would be loaded a second time."""
_NOT_FOUND = ("model_not_found", "model_not_downloaded", "model_not_loaded")


def server_client(settings: Settings) -> httpx.Client:
    """A client with the first of the server's keys, which trusts the server's certificate.

    Raises CommandError if the certificate cannot be read.
    """
    tls, keys = settings.access.tls, settings.access.keys
    try:
        trusted = ssl.create_default_context(cafile=tls.certificate) if tls else True
    except OSError as error:
        raise CommandError(f"--ssl-certfile: {error}", ExitCode.USAGE) from error
    headers = {"authorization": f"Bearer {keys[0].key}"} if keys else {}
    return httpx.Client(base_url=settings.url(), headers=headers, verify=trusted)


def is_up(client: httpx.Client) -> bool:
    """Whether an exo server answers."""
    try:
        return client.get("/health", timeout=_HEALTH_TIMEOUT).json() == {"status": "ok"}
    except (httpx.HTTPError, ValueError):
        return False


def ask(
    client: httpx.Client,
    path: str,
    *,
    params: Mapping[str, str] | None = None,
    body: Mapping[str, object] | None = None,
    seconds: float | None = _SECONDS,
) -> bytes:
    """The server's reply to a GET or, with a body, a POST. Raises CommandError."""
    try:
        reply = client.request("GET" if body is None else "POST", path, params=params, json=body, timeout=seconds)
    except httpx.HTTPError as error:
        raise CommandError(
            f"no server answers at {client.base_url} ({error}); start one with `exo serve`, or give its address with"
            " --host and --port",
            ExitCode.UNREACHABLE,
        ) from error
    if reply.status_code != 200:
        raise refusal(client, reply.content)
    return reply.content


def refusal(client: httpx.Client, reply: bytes) -> CommandError:
    """The error that an unsuccessful reply states."""
    try:
        return told(json.loads(reply)["error"])
    except (ValueError, KeyError, TypeError):
        return foreign(client)


def told(error: Mapping[str, JsonValue]) -> CommandError:
    """The command's error for an error object of the API. Raises KeyError if it is none."""
    code = ExitCode.NOT_FOUND if error["code"] in _NOT_FOUND else ExitCode.FAILED
    return CommandError(cast(str, error["message"]), code)


def foreign(client: httpx.Client) -> CommandError:
    """The error for a reply that no exo server of this version sends."""
    return CommandError(f"the program that answers at {client.base_url} is no exo server of this version")
