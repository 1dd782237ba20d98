"""llama-server's own endpoints for text: the fields and replies that its clients read."""

import json
from collections.abc import Generator
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf, write_scripted
from tests.support.tiny.filling import FIM, FIRST_FIM, write_filling

REPLY = ("one ", "two\n", "three ", "four")
FIRST = 256
"""The id of the first piece of a scripted model's reply, which follows a line feed."""
PROMPT = "say it\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_scripted(home / "talk.gguf", REPLY)
    write_gguf(home / "tiny.gguf", Shape(scale=0.5))
    write_filling(home / "code.gguf")
    write_filling(home / "files.gguf", FIM[:3])
    write_filling(home / "half.gguf", FIM[:1])
    for name in ("talk", "tiny", "code", "files", "half"):
        table: dict[str, JsonValue] = {"path": str(home / f"{name}.gguf"), "threads": 1, "n_ctx": 1024, "slots": 2}
        write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"])
    with ServeProgram(home) as server:
        yield server


def post(server: ServeProgram, path: str = "/completion", /, **body: object) -> httpx.Response:
    return server.client.post(path, json={"model": "talk", "prompt": PROMPT, **body})


def events(server: ServeProgram, **body: object) -> list[dict[str, Any]]:
    lines = post(server, stream=True, **body).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def test_a_reply_has_the_fields_of_llama_server(server: ServeProgram) -> None:
    reply = post(server, cache_prompt=True, id_slot=-1)
    assert reply.headers.get("x-exo-warning") is None
    said = reply.json()
    assert said["content"] == "".join(REPLY)
    assert (said["stop"], said["stop_type"], said["stopping_word"]) == (True, "eos", "")
    assert (said["tokens_predicted"], said["tokens_evaluated"]) == (len(REPLY) + 1, len(PROMPT))
    assert (said["tokens"], said["has_new_line"], said["truncated"], said["prompt"]) == ([], True, False, PROMPT)
    assert said["timings"]["predicted_n"] == len(REPLY) + 1
    assert said["generation_settings"]["n_predict"] == -1
    assert "completion_probabilities" not in said


def test_n_predict_and_stop_strings_end_it(server: ServeProgram) -> None:
    cut = post(server, n_predict=2, return_tokens=True).json()
    assert (cut["content"], cut["stop_type"], cut["tokens"]) == ("one two\n", "limit", [FIRST, FIRST + 1])
    assert cut["generation_settings"]["n_predict"] == 2
    word = post(server, stop=["three"]).json()
    assert (word["content"], word["stop_type"], word["stopping_word"]) == ("one two\n", "word", "three")
    none = post(server, n_predict=0).json()
    assert (none["content"], none["tokens_predicted"], none["tokens_evaluated"]) == ("", 0, len(PROMPT))


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_stop_token_ids_end_a_reply_without_being_part_of_it(server: ServeProgram, path: str) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    said = post(server, path, stop_token_ids=[FIRST + 2], messages=messages).json()
    if path == "/completion":
        assert (said["content"], said["stop_type"], said["tokens_predicted"]) == ("one two\n", "eos", 3)
    else:
        (choice,) = said["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert (text, choice["finish_reason"]) == ("one two\n", "stop")


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_a_reply_may_end_with_what_ended_it_and_have_allowed_tokens_only(server: ServeProgram, path: str) -> None:
    def said(**body: object) -> str:
        messages = [{"role": "user", "content": PROMPT}]
        reply = post(server, path, **body, messages=messages, include_stop_str_in_output=True).json()
        (choice,) = reply.get("choices", [{"text": reply.get("content")}])
        return choice["text"] if "text" in choice else choice["message"]["content"]

    assert said(stop=["three"]) == "one two\nthree"
    assert said(stop_token_ids=[FIRST + 2]) == "one two\nthree "
    assert said(allowed_token_ids=[FIRST + 1], max_tokens=2, n_predict=2) == "two\ntwo\n"
    both = post(
        server, path, allowed_token_ids=[1], grammar='root ::= "a"', messages=[{"role": "user", "content": "a"}]
    )
    wrong = post(server, path, allowed_token_ids=[1 << 20], messages=[{"role": "user", "content": "a"}])
    for refused in (both, wrong):
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "allowed_token_ids"), refused.text


def test_a_stop_token_does_not_end_the_first_min_tokens(server: ServeProgram) -> None:
    body = {"stop_token_ids": [FIRST, FIRST + 2], "min_tokens": 2}
    assert post(server, **body).json()["content"] == "one two\n"
    wrong = post(server, stop_token_ids=[1 << 20])
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "stop_token_ids")


def test_a_stream_ends_with_the_whole_reply_but_its_text(server: ServeProgram) -> None:
    *chunks, last = events(server, return_tokens=True)
    assert "".join(chunk["content"] for chunk in chunks) == "".join(REPLY)
    assert [token for chunk in chunks for token in chunk["tokens"]][: len(REPLY)] == [*range(FIRST, FIRST + len(REPLY))]
    assert not any(chunk["stop"] for chunk in chunks)
    assert [chunk["tokens_predicted"] for chunk in chunks] == [*range(1, len(chunks) + 1)]
    assert not any("timings" in chunk for chunk in chunks)
    whole = post(server).json()
    for told in (last, whole):
        for varying in ("timings", "generation_settings", "content"):
            del told[varying]
    assert last == whole
    assert all("timings" in chunk for chunk in events(server, timings_per_token=True))


def test_n_probs_gives_each_token_with_its_alternatives(server: ServeProgram) -> None:
    whole = post(server, n_probs=3, n_predict=3).json()["completion_probabilities"]
    assert [(each["id"], each["token"]) for each in whole] == [(FIRST + at, REPLY[at]) for at in range(3)]
    for each in whole:
        assert (len(each["top_logprobs"]), each["bytes"]) == (3, list(each["token"].encode()))
        assert each["top_logprobs"][0] == {key: each[key] for key in ("id", "token", "bytes", "logprob")}
    *chunks, _ = events(server, n_probs=3, n_predict=3)
    assert [each for chunk in chunks for each in chunk["completion_probabilities"]] == whole
    refused = post(server, n_probs=3, post_sampling_probs=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "post_sampling_probs")
    assert post(server, post_sampling_probs=True).status_code == 200


def test_prompts_of_texts_and_tokens(server: ServeProgram) -> None:
    whole = "".join(REPLY)
    assert post(server, prompt={"prompt_string": PROMPT}).json()["content"] == whole
    mixed = post(server, prompt=[ord("s"), "ay", " it", ord("\n")]).json()
    assert (mixed["content"], mixed["tokens_evaluated"]) == (whole, len(PROMPT))
    several = post(server, prompt=["a", [ord("\n")], [98, "c\n"]]).json()
    assert [(each["index"], each["content"] == whole) for each in several] == [(0, False), (1, True), (2, True)]
    assert several[2]["prompt"] == [98, "c\n"]
    several_wrong: list[object] = [[], [[]], 5, [1.5], [True], {"prompt_string": "a", "multimodal_data": ["x"]}]
    for wrong in several_wrong:
        refused = post(server, prompt=wrong)
        assert (refused.status_code, refused.json()["error"]["param"].split(".")[0]) == (400, "prompt"), wrong


def test_output_follows_a_grammar(server: ServeProgram) -> None:
    letter = post(server, model="tiny", seed=-1, n_predict=50, grammar='root ::= "a" | "b"').json()
    assert letter["content"] in ("a", "b")
    value = post(server, model="tiny", seed=-1, n_predict=50, json_schema={"enum": ["x", "y"]}).json()
    assert json.loads(value["content"]) in ("x", "y")


def test_fields_without_effect_are_said(server: ServeProgram) -> None:
    reply = post(server, samplers=["top_k"], mirostat=2, temprature=1)
    assert reply.status_code == 200
    warned = reply.headers["x-exo-warning"]
    assert all(name in warned for name in ("samplers", "mirostat", "temprature"))


def tokens_of(text: str) -> list[int]:
    """The tokens of a text for a model without merges."""
    return [*text.encode()]


PRE, SUF, MID, REPO, FILE = range(FIRST_FIM, FIRST_FIM + len(FIM))
BEFORE, AFTER = "f(<|fim_middle|>", ")\n"
MIDDLE = [PRE, *tokens_of(BEFORE), SUF, *tokens_of(AFTER), MID]
EXTRA = [{"filename": "a.py", "text": "1"}]


@pytest.mark.parametrize(
    ("model", "path", "body", "prompt"),
    [
        ("code", "/infill", {"input_prefix": BEFORE, "input_suffix": AFTER}, MIDDLE),
        ("code", "/infill", {"input_prefix": BEFORE, "input_suffix": AFTER, "prompt": "x"}, [*MIDDLE, ord("x")]),
        (
            "code",
            "/infill",
            {"input_prefix": BEFORE, "input_suffix": AFTER, "input_extra": EXTRA},
            [REPO, *b"repository\n", FILE, *b"a.py\n1", FILE, *b"this file\n", *MIDDLE],
        ),
        (
            "files",
            "/infill",
            {"input_prefix": BEFORE, "input_suffix": AFTER, "input_extra": EXTRA},
            [*b"\n# a.py\n1", *MIDDLE],
        ),
        ("code", "/v1/completions", {"prompt": BEFORE, "suffix": AFTER}, MIDDLE),
        ("code", "/api/generate", {"prompt": BEFORE, "suffix": AFTER, "stream": False}, MIDDLE),
    ],
    ids=["infill", "begun", "files", "files without tokens", "completions", "generate"],
)
def test_a_middle_is_filled_in(
    server: ServeProgram, model: str, path: str, body: dict[str, object], prompt: list[int]
) -> None:
    """The reply is that to the same tokens as a prompt; control tokens in the user's text are text."""
    sampling = {
        "/infill": {"temperature": 0, "n_predict": 8},
        "/v1/completions": {"temperature": 0, "max_tokens": 8},
        "/api/generate": {"options": {"temperature": 0, "num_predict": 8}},
    }[path]
    filled = server.client.post(path, json={"model": model, **body, **sampling}).json()
    same = post(server, model=model, prompt=prompt, n_predict=8, temperature=0).json()
    text = filled["content"] if "content" in filled else filled.get("response") or filled["choices"][0]["text"]
    assert text == same["content"]
    n_prompt = filled.get("tokens_evaluated") or filled.get("prompt_eval_count") or filled["usage"]["prompt_tokens"]
    assert n_prompt == len(prompt) == same["tokens_evaluated"]


@pytest.mark.parametrize(
    ("model", "lacking"), [("talk", "fim_pre, fim_suf, fim_mid;"), ("half", "for fim_suf, fim_mid;")]
)
def test_a_model_without_tokens_for_it_cannot_fill_in(server: ServeProgram, model: str, lacking: str) -> None:
    infill = post(server, "/infill", model=model, prompt="", input_prefix="a", input_suffix="b")
    completion = post(server, "/v1/completions", model=model, suffix="b")
    for refused, param in ((infill, "input_suffix"), (completion, "suffix")):
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, param)
        assert lacking in error["message"]
