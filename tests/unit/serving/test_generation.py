"""What a client is told of a sequence: why it ends, and which calls it may run."""

import json
from collections.abc import Sequence

import pytest

from exo.api.http.reply import ReplyChoice
from exo.chat.output.registry import FORMATS
from exo.serving.events import ChoiceDelta, ChoiceFinished
from exo.serving.generation import ChoiceReader
from exo.worker.protocol.events import Delta, Finished, Usage
from tests.support.replies import ONE_CALL, TOOLS

BROKEN = ONE_CALL["hermes"].replace("3", "tree")
USAGE = Usage(prompt_tokens=1, completion_tokens=1)


def both(
    pieces: Sequence[str], reason: str = "stop", stop: str | None = None, name: str = "hermes"
) -> tuple[ChoiceFinished, ReplyChoice]:
    """The end of a stream, and the whole reply."""
    reader = ChoiceReader(0, FORMATS[name].parser(tools=TOOLS, in_reasoning=False))
    choice = ReplyChoice()
    for text in pieces:
        event = reader.read(Delta(id="r", text=text, tokens=(1,)))
        assert isinstance(event, ChoiceDelta)
        choice.add(event)
    end = reader.read(Finished.model_validate({"id": "r", "reason": reason, "text": "", "stop": stop, "usage": USAGE}))
    assert isinstance(end, ChoiceFinished)
    choice.add(end)
    return end, choice


def test_a_reply_with_calls_ends_for_them() -> None:
    end, choice = both([ONE_CALL["hermes"]])
    assert (end.reason, choice.reason) == ("tool_calls", "tool_calls")
    assert [json.loads(call.arguments) for call in choice.calls] == [{"city": "Paris", "days": 3}]


@pytest.mark.parametrize("pieces", [[BROKEN], list(BROKEN)])
def test_a_broken_call_is_text_and_the_reply_does_not_end_for_it(pieces: Sequence[str]) -> None:
    end, choice = both(pieces)
    assert (end.reason, choice.reason, choice.calls, choice.content) == ("stop", "stop", [], BROKEN)


def test_of_a_whole_and_a_broken_call_only_the_whole_one_can_be_run() -> None:
    end, choice = both([ONE_CALL["hermes"], BROKEN])
    assert end.reason == "stop", "a stream has told both"
    assert (choice.reason, choice.content, len(choice.calls)) == ("tool_calls", BROKEN, 1)


@pytest.mark.parametrize("cut", range(20, len(ONE_CALL["hermes"]) - len("}\n</tool_call>")))
def test_what_the_limit_cuts_off_is_no_content_and_no_whole_call(cut: int) -> None:
    end, choice = both([ONE_CALL["hermes"][:cut]], "length")
    assert (end.reason, choice.reason, choice.content) == ("length", "length", "")
    assert not any(call.whole for call in choice.calls)


def test_a_call_that_a_stop_string_cuts_off_is_none() -> None:
    end, choice = both([ONE_CALL["hermes"][:60]], "stop", stop="Par")
    assert (end.reason, choice.reason, choice.content, choice.calls) == ("stop", "stop", "", [])
