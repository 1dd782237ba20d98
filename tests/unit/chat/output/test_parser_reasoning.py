"""What a model thinks aloud, told from what it says, in every way that models mark it."""

import pytest

from exo.chat.output.events import Content, Part, Reasoning
from exo.chat.output.registry import FORMATS, OutputFormat, output_format
from tests.support.replies import MARKED, ONE_CALL, THE_CALL, form, read

TAGS = output_format("{{ messages }}</think>")
BRACKETS = output_format("[THINK]")
HARMONY = FORMATS["harmony"]
GEMMA4 = FORMATS["gemma4"]


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none", "<think>\nHm.\n</think>\n\nYes.", [Reasoning("Hm."), Content("Yes.")]),
        ("none", "\n<think>a</think>b<think>c</think>", [Reasoning("a"), Content("b<think>c</think>")]),
        ("none", "It opens <think> and closes </think> then.", [Content("It opens <think> and closes </think> then.")]),
        ("none", "<think>\n\n</think>\n\n<think>a</think>b", [Reasoning("a"), Content("b")]),
        ("none", "<think>\n<think>\na</think>b", [Reasoning("a"), Content("b")]),
        ("none", "\n</think>\n\nYes.", [Content("Yes.")]),
        ("none", "</think><think>a</think>b", [Reasoning("a"), Content("b")]),
        ("none", "<think><thin", [Reasoning("<thin")]),
        ("none", " <thin", [Content(" <thin")]),
        ("gemma4", "a<|channel>thought\nHm.\n<channel|>b", [Content("a"), Reasoning("Hm."), Content("b")]),
        ("none", "<think>\n\n</think>\n\nYes.", [Content("Yes.")]),
        ("none", "<think>cut off </th", [Reasoning("cut off </th")]),
        ("none", "a <thin b", [Content("a <thin b")]),
        ("hermes", f"<think>Hm.</think>\n{ONE_CALL['hermes']}", [Reasoning("Hm."), *THE_CALL]),
        ("hermes", "<think><tool_call></think>Yes.", [Reasoning("<tool_call>"), Content("Yes.")]),
        ("llama3", f"<think>Hm.</think>\n\n{ONE_CALL['llama3']}", [Reasoning("Hm."), *THE_CALL]),
        ("gemma4", "<|channel>thought\nHm.\n<channel|>Yes.", [Reasoning("Hm."), Content("Yes.")]),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
            [Reasoning("Hm."), Content("Yes.")],
        ),
        (
            "harmony",
            "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>analysis<|message|>Hm."
            f"<|end|><|start|>assistant{ONE_CALL['harmony']}",
            [Content("Let me look."), Reasoning("Hm."), *THE_CALL],
        ),
        (
            "harmony",
            "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Then.",
            [Content("First.\n\nThen.")],
        ),
        ("harmony", "No header.<|end|>", [Content("No header.")]),
        ("harmony", "<|channel|>final<|message|>no end<|start|>assistant<|channel|>fin", [Content("no end")]),
    ],
)
def test_reasoning_is_told_from_content(name: str, text: str, expected: list[Part], one_by_one: bool) -> None:
    assert read(form(name), text if one_by_one else [text]) == expected


def test_mistral_marks_reasoning_with_brackets_that_are_control_tokens() -> None:
    assert BRACKETS.special
    assert read(BRACKETS, "[THINK]Hm.[/THINK]Yes.") == [Reasoning("Hm."), Content("Yes.")]


@pytest.mark.parametrize(
    ("by", "prompt", "reply"),
    [
        (TAGS, "<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nYes."),
        (BRACKETS, "[/INST][THINK]", "Hm.[/THINK]Yes."),
        (HARMONY, "<|start|>assistant<|channel|>analysis<|message|>", "Hm.<|end|><|channel|>final<|message|>Yes."),
        (GEMMA4, "<|turn>model\n<|channel>thought\n", "Hm.<channel|>Yes."),
    ],
)
def test_a_prompt_may_begin_the_reasoning(by: OutputFormat, prompt: str, reply: str) -> None:
    assert by.starts_in_reasoning(f"earlier</think>{prompt}")
    assert read(by, reply, in_reasoning=True) == [Reasoning("Hm."), Content("Yes.")]


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nHm.</think>Yes.", [Reasoning("Hm."), Content("Yes.")]),
        ("\n<think>\n<think>Hm.</think>Yes.", [Reasoning("Hm."), Content("Yes.")]),
        ("Say <think>.</think>Yes.", [Reasoning("Say <think>."), Content("Yes.")]),
    ],
)
def test_a_model_may_begin_reasoning_that_the_prompt_has_begun(
    text: str, expected: list[Part], one_by_one: bool
) -> None:
    assert read(TAGS, text if one_by_one else [text], in_reasoning=True) == expected


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("name", MARKED)
def test_a_call_in_reasoning_that_never_ends_is_a_call(name: str, one_by_one: bool) -> None:
    text = f"I should look.\n{ONE_CALL[name]}\n"
    assert read(form(name), text if one_by_one else [text], in_reasoning=True) == [
        Reasoning("I should look."),
        *THE_CALL,
    ]


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("name", MARKED)
def test_the_draft_of_a_call_in_reasoning_that_ends_is_reasoning(name: str, one_by_one: bool) -> None:
    thinking = form(name).thinking
    assert thinking is not None
    text = f"Like {ONE_CALL[name]}?\n{thinking.end}\n\nYes. {ONE_CALL[name]}"
    parts = read(form(name), text if one_by_one else [text], in_reasoning=True)
    assert parts == [Reasoning(f"Like {ONE_CALL[name]}?"), Content("Yes."), *THE_CALL]


@pytest.mark.parametrize("one_by_one", [True, False])
def test_what_only_looks_like_a_call_in_reasoning_that_never_ends_is_reasoning(one_by_one: bool) -> None:
    text = "I could write <tool_call> here, or <tool_call>{} there. "
    parts = read(form("hermes"), text if one_by_one else [text], in_reasoning=True)
    assert parts == [Reasoning(text)]


def test_a_call_in_reasoning_that_the_limit_cut_off_is_reasoning() -> None:
    text = f"Like {ONE_CALL['hermes']}"
    assert read(form("hermes"), text, in_reasoning=True, cut_off=True) == [Reasoning(text)]


@pytest.mark.parametrize(
    "prompt", ["", "assistant\n", "<think>\n\n</think>\n\n", "user\nWrite <think>\nassistant\n", "<|start|>assistant"]
)
def test_a_prompt_that_ends_elsewhere_does_not(prompt: str) -> None:
    assert not TAGS.starts_in_reasoning(prompt)
    assert not HARMONY.starts_in_reasoning(prompt)


def test_reasoning_is_released_as_it_arrives() -> None:
    parser = TAGS.parser(tools=False, in_reasoning=True)
    assert parser.push("Let me ") == [Reasoning("Let me")]
    assert parser.push("see</thi") == [Reasoning(" see")]
    assert parser.push("nk>") == []


def test_without_marks_for_reasoning_its_tags_are_text() -> None:
    assert read(FORMATS["none"], "<think>a</think>b") == [Content("<think>a</think>b")]


def test_a_prompt_that_begins_minimax_m3s_reasoning() -> None:
    by = FORMATS["minimax-m3"]
    assert by.starts_in_reasoning("]~b]ai\n<mm:think>")
    assert not by.starts_in_reasoning("]~b]ai\n</mm:think>")
    for text in ("Hm.</mm:think>\n\nYes.", "<mm:think>Hm.</mm:think>\n\nYes."):
        assert read(by, text, in_reasoning=True) == [Reasoning("Hm."), Content("Yes.")]
