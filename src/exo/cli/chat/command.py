"""``exo chat``: a conversation at the terminal."""

import json
from dataclasses import dataclass
from typing import Annotated, final

import httpx
import typer
from pydantic import JsonValue

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.cli.chat.answer_stream import CallId, Note, answer
from exo.cli.chat.input import ChatInput
from exo.cli.chat.screen import AnswerScreen
from exo.cli.chat.settings import ChatSettings
from exo.cli.console import err, out, warn
from exo.cli.models.local_models import catalogue_of
from exo.cli.models.named_model import requested_model
from exo.cli.options import AnyModel, ModelsDir, SamplingOptions, ServerOptions
from exo.cli.server.embedded_server import some_server
from exo.cli.server.http_client import ask
from exo.exit_code import CommandError

HELP = '''\
/set NAME VALUE   changes a setting; without a value it resets it, without a name it shows all settings
/clear            forgets the conversation; settings stay
/help             shows this text
/exit             ends the chat, as Ctrl-D does
"""               begins a message of several lines, which ends with the next three quotation marks
\\                 at the end of a line continues the message on the next line
Ctrl-C            stops an answer, or drops the typed line'''


def chat(
    model: AnyModel,
    *,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    sampling: SamplingOptions,
    server: ServerOptions,
    models_dir: ModelsDir = None,
) -> None:
    """Talk with a model through the running server or, if there is none, through a runner of its own.

    /help lists the commands inside.
    """
    settings = server.settings(models_dir)
    chosen = {**({"system": system} if system is not None else {}), **sampling.request_fields()}
    named = requested_model(settings, model)
    with some_server(settings, lambda: catalogue_of(settings, named.own)) as client:
        conversation = Chat(client, named.name, ChatSettings(chosen), ChatInput(settings.history_file))
        conversation.begin()
        conversation.run()


@final
class Chat:
    """A conversation with ``model`` through the server that ``client`` asks."""

    def __init__(self, client: httpx.Client, model: str, settings: ChatSettings, typed: ChatInput) -> None:
        self._client = client
        self._model = model
        self._settings = settings
        self._typed = typed
        self._messages: list[dict[str, JsonValue]] = []
        self._unanswered: list[dict[str, JsonValue]] = []
        """Tool calls whose results the user types next."""

    def begin(self) -> None:
        """Prints the model and its runner. Raises CommandError if there is none."""
        with err.status("starting"):
            question = {"model": self._model, "plan": "false"}
            route = json.loads(ask(self._client, "/v1/route", params=question, seconds=None))
        _say(f"{route['model']} on runner {route['runner']}; /help lists the commands, Ctrl-D ends the chat")

    def run(self) -> None:
        """Runs until the input ends or the user ends the chat."""
        while True:
            try:
                text = self._read()
                if text.startswith("/"):
                    if not self._obey(text):
                        return
                elif text.strip():
                    self._answer(text)
            except EOFError:
                _say("")
                return
            except KeyboardInterrupt:
                _say("\n(Ctrl-D or /exit ends the chat)")
            except UnicodeDecodeError as error:
                warn(f"the input is not text: {error}")
            except CommandError as error:
                warn(str(error))

    def _read(self) -> str:
        if self._unanswered:
            _say(f"type the result of {self._unanswered[0]['name']}")
        return self._typed.read()

    def _obey(self, text: str) -> bool:
        """Runs a command of the chat. Returns whether the chat goes on."""
        command, _, rest = text.partition(" ")
        match command.strip():
            case "/exit" | "/quit" | "/bye":
                return False
            case "/help" | "/?":
                _say(HELP)
            case "/clear":
                self._messages, self._unanswered = [], []
                _say("the conversation is cleared")
            case "/set" if rest.strip():
                name, _, value = rest.strip().partition(" ")
                self._settings.set(name, value.strip())
            case "/set":
                _say("\n".join(self._settings.lines()))
            case unknown:
                warn(f"there is no command {unknown}; /help lists them; a space before it makes it a message")
        return True

    def _answer(self, text: str) -> None:
        """Sends a message. Adds it and its answer, or the part before a stop, to the conversation."""
        if self._unanswered:
            call = self._unanswered[0]
            self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
            del self._unanswered[0]
            if self._unanswered:
                return
        else:
            self._messages.append({"role": "user", "content": text.strip()})
        said = _Said()
        messages = [*self._settings.messages(), *self._messages]
        body: dict[str, object] = {"model": self._model, "messages": messages, **self._settings.fields()}
        try:
            with answer(self._client, body) as events, AnswerScreen(out) as screen:
                for event in events:
                    if isinstance(event, Note):
                        screen.note(event.text)
                        continue
                    said.take(event)
                    if not isinstance(event, CallId):
                        screen.part(event)
            self._unanswered = [{"id": call.id, "name": call.name} for call in said.calls.values()]
        except KeyboardInterrupt:
            said.calls.clear()  # they may be cut off
            _say("(stopped)")
        finally:
            if said.content or said.calls:
                self._messages.append(said.message())
            else:
                self._forget_question()

    def _forget_question(self) -> None:
        """Removes the messages that got no answer."""
        while self._messages and self._messages[-1]["role"] != "assistant":
            self._messages.pop()
        if self._messages and "tool_calls" in self._messages[-1]:
            self._messages.pop()
            self._forget_question()


def _say(text: str) -> None:
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


@dataclass(slots=True)
class _CallInProgress:
    name: str
    id: str = ""
    arguments: str = ""


@final
class _Said:
    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: dict[int, _CallInProgress] = {}

    def take(self, event: Part | CallId) -> None:
        match event:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case ToolCall(index, name):
                self.calls[index] = _CallInProgress(name)
            case CallId(index, name):
                self.calls[index].id = name
            case Arguments(index, text):
                self.calls[index].arguments += text
            case BrokenCall(index, _):
                del self.calls[index]

    def message(self) -> dict[str, JsonValue]:
        """The answer as a message of the conversation."""
        message: dict[str, JsonValue] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
                for each in self.calls.values()
            ]
        return message
