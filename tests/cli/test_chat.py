"""``exo chat`` as its users have it: a real terminal, a real server, keys that are typed."""

import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import JsonValue
from rich.console import Console

from exo.chat.output.events import Arguments, Content, Reasoning, ToolCall
from exo.cli.chat.screen import AnswerScreen, settled
from exo.cli.chat.settings import ChatSettings
from exo.exit_code import CommandError
from tests.support.api_server import CHAT_TEMPLATE
from tests.support.server import ServeProgram, environment, is_runner, write_card
from tests.support.terminal import CTRL_C, CTRL_D, PROMPT, UP, Terminal, plain
from tests.support.tiny import Shape, write_gguf, write_scripted


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    table: dict[str, JsonValue] = {"chat_template": CHAT_TEMPLATE, "slots": 2}
    endless: dict[str, JsonValue] = {"n_ctx": 1_000_000_000, "step_seconds": 0.001}
    write_card(home, "short", {"cuda": {**table, "eos_after": 30}}, backends=["LlamaCppCpu"])
    write_card(home, "endless", {"cuda": {**table, **endless}}, backends=["LlamaCppCpu"])
    with ServeProgram(home, fake=True) as server:
        yield server


def chat(server: ServeProgram, *arguments: str) -> Terminal:
    return Terminal(server.log.parent, "chat", *arguments, "--port", str(httpx.URL(server.url).port))


def reply_to(server: ServeProgram, *messages: str, system: JsonValue = None, **fields: JsonValue) -> str:
    """What the model answers to a conversation, the user's word first; the same, whoever asks."""
    talk = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(messages)]
    first = [{"role": "system", "content": system}] if system is not None else []
    body = {"model": "short", "messages": [*first, *talk], "temperature": 0, **fields}
    return server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def shows(screen: str, text: str) -> bool:
    """Whether a text is there but for its line ends and spaces, which Markdown has its own way with."""
    return " ".join(text.split()) in " ".join(screen.split())


def test_a_conversation_is_remembered_until_it_is_cleared(server: ServeProgram) -> None:
    with chat(server, "short", "--temperature", "0") as terminal:
        assert "test/short on runner cuda; /help lists the commands" in terminal.wait_for(PROMPT)
        first = reply_to(server, "hello there")
        assert len(first) == 30
        assert shows(terminal.say("hello there"), first)
        assert shows(terminal.say("and again"), reply_to(server, "hello there", first, "and again"))
        terminal.say("/clear")
        assert shows(terminal.say("anew"), reply_to(server, "anew"))
        terminal.keys(CTRL_D)
        assert terminal.end() == 0


def test_settings_are_checked_when_they_are_made_and_hold_for_what_follows(server: ServeProgram) -> None:
    with chat(server, "short", "--seed", "5") as terminal:
        terminal.wait_for(PROMPT)
        assert "temperature: " in (said := terminal.say("/set temperature hot"))
        assert "exo: " in said
        assert "there is no setting 'temprature'" in terminal.say("/set temprature 1")
        assert "less than or equal to 2" in terminal.say("/set temperature 3")
        terminal.say("/set temperature 0.25")
        terminal.say("/set system You are terse.")
        terminal.say("/set max_tokens 7")
        shown = terminal.say("/set")
        assert re.search(r"temperature +0\.25\n", shown)
        assert re.search(r"seed +5\n", shown)
        assert re.search(r"top_p +not set \(0 to 1", shown)
        fields: dict[str, JsonValue] = {"temperature": 0.25, "seed": 5, "max_tokens": 7}
        first = reply_to(server, "hi", system="You are terse.", **fields)
        assert len(first) == 7
        assert shows(terminal.say("hi"), first)
        terminal.say("/set system")
        assert shows(terminal.say("ho"), reply_to(server, "hi", first, "ho", **fields))
        assert "Ctrl-C " in terminal.say("/help")
        terminal.keys("/exit\r")
        assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_frees_its_slot_and_the_chat_goes_on(server: ServeProgram) -> None:
    with chat(server, "endless") as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys("tell me\r")
        terminal.wait_for("tell me")
        terminal.wait_for(r"[etaoin shrdlu\n]{200}")
        terminal.keys(CTRL_C)
        terminal.wait_for(r"\(stopped\)")
        terminal.wait_for(PROMPT)
        while any(each["active"] for each in server.client.get("/v1/instances").json()["data"]):
            time.sleep(0.02)
        terminal.keys("half a line")
        terminal.wait_for("half a line")  # Python misses a Ctrl-C between the prompt and its wait for keys
        terminal.keys(CTRL_C)
        terminal.wait_for("Ctrl-D or /exit ends the chat")
        terminal.wait_for(PROMPT)
        terminal.keys("more\r")
        terminal.wait_for(r"[etaoin shrdlu\n]{100}")
        terminal.keys(CTRL_C)
        terminal.wait_for(r"\(stopped\)")
        terminal.wait_for(PROMPT)
        terminal.keys(CTRL_D)
        assert terminal.end() == 0


def test_what_was_typed_is_there_the_next_time_and_nobody_elses(server: ServeProgram) -> None:
    with chat(server, "short") as terminal:
        terminal.wait_for(PROMPT)
        terminal.say("a thing worth repeating")
        terminal.keys(CTRL_D)
        assert terminal.end() == 0
    history = server.log.parent / "chat_history"
    assert "a thing worth repeating" in history.read_text().splitlines()
    assert history.stat().st_mode & 0o777 == 0o600
    with chat(server, "short", "--temperature", "0") as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(UP)
        terminal.wait_for("a thing worth repeating")
        assert shows(terminal.say(""), reply_to(server, "a thing worth repeating"))


def test_a_message_may_have_several_lines(server: ServeProgram) -> None:
    with chat(server, "short", "--temperature", "0") as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys('"""first\r')
        terminal.wait_for(r"\.\.\. ")
        terminal.keys("second\r")
        terminal.wait_for(r"\.\.\. ")
        assert shows(terminal.say('third"""'), reply_to(server, "first\nsecond\nthird"))
        terminal.say("/clear")
        terminal.keys("one\\\r")
        terminal.wait_for(r"\.\.\. ")
        assert shows(terminal.say("two"), reply_to(server, "one\ntwo"))
        assert "/help lists them" in terminal.say("/hlep")


def test_an_error_ends_the_question_and_not_the_chat(server: ServeProgram) -> None:
    with chat(server, "short", "--temperature", "0") as terminal:
        terminal.wait_for(PROMPT)
        terminal.say("/set stop " + json.dumps(["a", "b"]))
        terminal.say("/set system " + "x" * 2000)
        assert "exo: " in terminal.say("y" * 3000)
        terminal.say("/set system")
        terminal.say("/set stop")
        assert shows(terminal.say("brief"), reply_to(server, "brief"))


def test_a_model_that_there_is_not_is_told_before_anything_is_typed(server: ServeProgram) -> None:
    with chat(server, "shrot") as terminal:
        terminal.wait_for("did you mean short")
        assert terminal.end() == 3


def test_lines_may_be_piped_in_and_the_answers_out(server: ServeProgram) -> None:
    port = str(httpx.URL(server.url).port)
    command = [sys.executable, "-m", "exo", "chat", "short", "--port", port, "--max-tokens", "9", "--temperature", "0"]
    done = subprocess.run(
        command,
        env=environment(server.log.parent),
        input="hi\nho\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == reply_to(server, "hi", max_tokens=9)
    assert second == reply_to(server, "hi", first, "ho", max_tokens=9)


def test_without_a_server_it_has_one_of_its_own_which_ends_with_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    table = {"path": str(tmp_path / "tiny.gguf"), "n_ctx": 512, "threads": 1, "chat_template": CHAT_TEMPLATE}
    write_card(tmp_path, "tiny", {"cuda": table})
    with Terminal(tmp_path, "chat", "tiny", "--port", _free_port(), "--max-tokens", "400") as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys("hello\r")
        runners: list[psutil.Process] = []
        while not runners:
            children = psutil.Process(terminal.process.pid).children(recursive=True)
            runners = [each for each in children if is_runner(each)]
        terminal.keys(CTRL_C)
        terminal.wait_for(PROMPT)
        terminal.say("hello")
        terminal.keys(CTRL_D)
        assert terminal.end() == 0
    assert not any(each.is_running() for each in runners)


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


def calling(home: Path, pieces: Sequence[str], *arguments: str) -> Terminal:
    """A chat with a model that says these pieces, and that may call ``time``."""
    write_scripted(home / "calls.gguf", pieces)
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if tools %}{{ tools | tojson ~ '\n' }}{% endif %}{# <tool_call> </think> #}"
    )
    write_card(
        home,
        "calls",
        {"cuda": {"path": str(home / "calls.gguf"), "n_ctx": 2048, "threads": 1, "chat_template": template}},
        tool_format="hermes",
    )
    function = {"name": "time", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}
    (home / "tools.json").write_text(json.dumps([{"type": "function", "function": function}]))
    return Terminal(home, "chat", "calls", "--port", _free_port(), "--temperature", "0", *arguments)


def test_tools_are_shown_called_and_what_is_typed_next_is_their_result(tmp_path: Path) -> None:
    call = '<tool_call>{"name": "time", "arguments": {"zone": "UTC"}}</tool_call>'
    with calling(tmp_path, ["<think>", "hm", "</think>", call]) as terminal:
        terminal.wait_for(PROMPT)
        terminal.say(f"/set tools {tmp_path / 'tools.json'}")
        said = terminal.say("what time is it?")
        assert "hm" in said
        assert 'calls time {"zone": "UTC"}' in said
        assert "type the result of time" in said
        assert "calls time" in terminal.say("noon")
        terminal.keys(CTRL_D)
        assert terminal.end() == 0


BROKEN = ["<tool_call>", '{"name": "time", "arguments": {"zone": ', "UTC or so}}", "</tool_call>"]


def test_a_call_that_cannot_be_read_waits_for_no_result(tmp_path: Path) -> None:
    with calling(tmp_path, BROKEN) as terminal:
        terminal.wait_for(PROMPT)
        terminal.say(f"/set tools {tmp_path / 'tools.json'}")
        for question in ("what time is it?", "and now?"):
            said = terminal.say(question)
            assert "calls time" in said
            assert "(cannot be read as a call)" in said
            assert "UTC or so" in said
            assert "type the result" not in said
            assert "exo: " not in said
        terminal.keys(CTRL_D)
        assert terminal.end() == 0


def test_a_call_that_the_limit_cuts_off_waits_for_no_result(tmp_path: Path) -> None:
    with calling(tmp_path, BROKEN, "--max-tokens", "2") as terminal:
        terminal.wait_for(PROMPT)
        terminal.say(f"/set tools {tmp_path / 'tools.json'}")
        for question in ("what time is it?", "and now?"):
            said = terminal.say(question)
            assert "(cut off)" in said
            assert "type the result" not in said
        terminal.keys(CTRL_D)
        assert terminal.end() == 0


def on_terminal(*parts: Content | Reasoning | ToolCall | Arguments, height: int = 10) -> str:
    """What is left on a terminal once the answer is there, with its colours."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=40, height=height, color_system="standard")
    with AnswerScreen(console) as screen:
        for part in parts:
            screen.part(part)
    return shown.getvalue()


def test_markdown_is_shown_as_such_and_reasoning_dimmed() -> None:
    text = on_terminal(Reasoning("let me\nthink"), Content("# Title\n\nSome **bo"), Content("ld** words\n\n- a\n- b\n"))
    assert "\x1b[2;3mlet me" in text
    assert "\x1b[1mbold" in text
    assert "**" not in text[text.rindex("Some") :]
    assert " • a" in plain(text)


def test_an_answer_taller_than_the_window_is_there_whole() -> None:
    code = "```\n" + "".join(f"line {number}\n" for number in range(50)) + "```\n"
    shown = plain(on_terminal(Content("Look:\n\n"), *(Content(f"{line}\n") for line in code.split("\n")), height=8))
    assert [line.strip() for line in shown.replace("\r", "").split("\n") if line.startswith(" line ")][-50:] == [
        f"line {number}" for number in range(50)
    ]


def test_what_a_model_says_cannot_speak_to_the_terminal() -> None:
    shown = on_terminal(Content("a\x1b]0;title\x07b\x9b31m"), ToolCall(0, "f"), Arguments(0, '{"x": "\x1b[2J"}'))
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown
    assert "\x9b" not in shown
    assert "\\x1b]0;title" in shown


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n", ""),
        ("one\n\n", "one\n\n"),
        ("one\n\ntwo\n", "one\n\n"),
        ("```py\na\n\nb\n", ""),
        ("```py\na\n\n~~~\n\n```\n", "```py\na\n\n~~~\n\n```\n"),
        ("````\n```\n\n````\nx", "````\n```\n\n````\n"),
        ("| a |\n|---|\n| 1 |\n", ""),
    ],
)
def test_a_block_is_printed_once_nothing_can_change_it(text: str, done: str) -> None:
    assert text[: settled(text)] == done


def test_a_setting_is_what_the_server_would_take() -> None:
    settings = ChatSettings({"temperature": 1.0})
    settings.set("stop", '["a", "\\n"]')
    settings.set("top_k", "40")
    settings.set("reasoning_effort", "low")
    settings.set("temperature", "")
    assert settings.fields() == {"stop": ["a", "\n"], "top_k": 40, "reasoning_effort": "low"}
    for name, value in (("top_k", "4.5"), ("reasoning_effort", "some"), ("seed", "x"), ("tools", "/nowhere.json")):
        with pytest.raises(CommandError, match=name):
            settings.set(name, value)
