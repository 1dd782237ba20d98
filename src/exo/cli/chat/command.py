"""``exo chat``: a conversation at the terminal."""

import json
from dataclasses import dataclass
from typing import final

import httpx
from pydantic import JsonValue
from rich.console import Console

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.cli.answer_stream import CallId, Note, answer
from exo.cli.chat.input import ChatInput
from exo.cli.chat.screen import AnswerScreen
from exo.cli.chat.settings import ChatSettings, SettingError
from exo.cli.http_client import ask
from exo.exit_code import CommandError

HELP = '''\
/set NAME VALUE   set something; without a value it is as if never set, without a name all settings are shown
/clear            forget the conversation; settings stay
/help             this
/exit             leave, as Ctrl-D does
"""               begins a message of several lines, which ends with the next three quotation marks
\\                 at the end of a line: the message goes on in the next
Ctrl-C            stops an answer, or drops what is being typed'''


@final
class Chat:
    """One conversation with ``model``, as the server at ``client`` calls it."""

    def __init__(
        self, client: httpx.Client, model: str, settings: ChatSettings, typed: ChatInput, out: Console, err: Console
    ) -> None:
        self._client = client
        self._model = model
        self._settings = settings
        self._typed = typed
        self._out = out
        self._err = err
        self._messages: list[dict[str, JsonValue]] = []
        self._unanswered: list[dict[str, JsonValue]] = []
        """Calls of tools, whose results are typed next."""

    def begin(self) -> None:
        """Says who answers. Raises CommandError where nobody would."""
        with self._err.status("starting"):
            route = json.loads(ask(self._client, "/v1/route", params={"model": self._model}, seconds=None))
        self._say(f"{route['model']} on runner {route['runner']}; /help lists the commands, Ctrl-D leaves")

    def run(self) -> None:
        """Until the input ends, or somebody leaves."""
        while True:
            try:
                text = self._read()
                if text.startswith("/"):
                    if not self._obey(text):
                        return
                elif text.strip():
                    self._answer(text)
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /exit leaves)")
            except UnicodeDecodeError as error:
                self._complain(f"what was typed is not text: {error}")
            except (CommandError, SettingError) as error:
                self._complain(str(error))

    def _read(self) -> str:
        if self._unanswered:
            self._say(f"type the result of {self._unanswered[0]['name']}")
        return self._typed.read()

    def _obey(self, text: str) -> bool:
        """Does what a command says. Returns whether the chat goes on."""
        command, _, rest = text.partition(" ")
        match command.strip():
            case "/exit" | "/quit" | "/bye":
                return False
            case "/help" | "/?":
                self._say(HELP)
            case "/clear":
                self._messages, self._unanswered = [], []
                self._say("the conversation is forgotten")
            case "/set" if rest.strip():
                name, _, value = rest.strip().partition(" ")
                self._settings.set(name, value.strip())
            case "/set":
                self._say("\n".join(self._settings.lines()))
            case unknown:
                self._complain(f"there is no command {unknown}; /help lists them. A space before it sends it as it is")
        return True

    def _answer(self, text: str) -> None:
        """Asks, and keeps question and answer; what was said of one that was stopped is kept too."""
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
            with answer(self._client, body) as events, AnswerScreen(self._out) as screen:
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
            self._say("(stopped)")
        finally:
            if said.content or said.calls:
                self._messages.append(said.message())
            else:
                self._forget_question()

    def _forget_question(self) -> None:
        """What got no answer is not part of the conversation."""
        while self._messages and self._messages[-1]["role"] != "assistant":
            self._messages.pop()
        if self._messages and "tool_calls" in self._messages[-1]:
            self._messages.pop()
            self._forget_question()

    def _say(self, text: str) -> None:
        self._err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _complain(self, text: str) -> None:
        self._err.print(f"exo: {text}", markup=False, highlight=False, soft_wrap=True)


@dataclass(slots=True)
class _Call:
    name: str
    id: str = ""
    arguments: str = ""


@final
class _Said:
    """An answer as far as it has come."""

    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: dict[int, _Call] = {}

    def take(self, event: Part | CallId) -> None:
        """More of it."""
        match event:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case ToolCall(index, name):
                self.calls[index] = _Call(name)
            case CallId(index, name):
                self.calls[index].id = name
            case Arguments(index, text):
                self.calls[index].arguments += text
            case BrokenCall(index, _):
                del self.calls[index]

    def message(self) -> dict[str, JsonValue]:
        """As the conversation has it from now on."""
        message: dict[str, JsonValue] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
                for each in self.calls.values()
            ]
        return message
