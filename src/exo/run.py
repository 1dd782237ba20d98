"""``exo run``: one prompt, through the server that is up or, where none is, with a runner of its own."""

import json
import ssl
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import anyio
import httpx

from exo.api.errors import ApiError
from exo.api.generation import Generation, GenerationRequest
from exo.api.openai_requests import ChatCompletionRequest, CompletionRequest
from exo.api.openai_routes import chat_request, completion_request
from exo.api.services import Services
from exo.config import Settings
from exo.models.catalogue import Catalogue
from exo.worker.messages import Capabilities, Delta, Finished, PrefillProgress, Status


class RunError(Exception):
    """There is no answer; the message says why."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Where an answer and what is said about its making go."""

    text: Callable[[str], None]
    note: Callable[[str], None]


def run_prompt(settings: Settings, catalogue: Catalogue, body: Mapping[str, object], screen: Screen) -> None:
    """Streams the answer to a chat or completion request (OpenAI's body) to ``screen``. Raises RunError."""
    with _client(settings) as client:
        if _is_up(client):
            _through_server(client, body, screen)
            return
    anyio.run(_by_itself, settings, catalogue, body, screen, backend_options={"use_uvloop": True})


def _client(settings: Settings) -> httpx.Client:
    """A client of the server, with the first of its keys. Its certificate is trusted, whoever signed it."""
    tls, keys = settings.access.tls, settings.access.keys
    try:
        trusted = ssl.create_default_context(cafile=tls.certificate) if tls else True
    except OSError as error:
        raise RunError(f"--ssl-certfile: {error}") from error
    headers = {"authorization": f"Bearer {keys[0].key}"} if keys else {}
    return httpx.Client(base_url=settings.url(), headers=headers, verify=trusted)


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health", timeout=2).json() == {"status": "ok"}
    except (httpx.HTTPError, ValueError):
        return False


def _through_server(client: httpx.Client, body: Mapping[str, object], screen: Screen) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    try:
        # No time limit: a large model may load for minutes, and the server says so meanwhile.
        with client.stream("POST", path, json={**body, "stream": True}, timeout=None) as reply:
            if reply.status_code != 200:
                raise RunError(json.loads(reply.read())["error"]["message"])
            for line in reply.iter_lines():
                _show_line(line, screen)
    except httpx.HTTPError as error:
        raise RunError(f"the server at {client.base_url} broke off: {error}") from error


def _show_line(line: str, screen: Screen) -> None:
    """One line of the stream: a comment while the model loads, or an event."""
    if line.startswith(": "):
        screen.note(line[2:])
    elif line.startswith("data: {"):
        event = json.loads(line[6:])
        if "error" in event:
            raise RunError(event["error"]["message"])
        for choice in event["choices"]:
            screen.text(choice.get("text") or choice.get("delta", {}).get("content") or "")


async def _by_itself(settings: Settings, catalogue: Catalogue, body: Mapping[str, object], screen: Screen) -> None:
    services = Services(settings, catalogue)
    async with services.running():
        try:
            await Generation(services, _request(body), f"run-{uuid.uuid4().hex}").run(_Sink(screen))
        except ApiError as error:
            raise RunError(str(error)) from error


def _request(body: Mapping[str, object]) -> GenerationRequest:
    if "messages" in body:
        return chat_request(ChatCompletionRequest.model_validate(body))
    return completion_request(CompletionRequest.model_validate(body))


@dataclass(slots=True)
class _Sink:
    screen: Screen

    async def loading(self, status: Status) -> None:
        layers = f" {status.layers_loaded}/{status.total_layers}" if status.total_layers else ""
        self.screen.note(f"{status.state.lower()}{layers}")

    def serving(self, model_id: str, capabilities: Capabilities) -> None:
        self.screen.note(f"{model_id} on {capabilities.backend}")

    async def event(self, choice: int, event: PrefillProgress | Delta | Finished) -> None:
        if not isinstance(event, PrefillProgress):
            self.screen.text(event.text)
