"""Pictures in requests: every dialect's forms, what is refused and how, and histories with models that see nothing."""

import json
import zlib
from base64 import b64encode
from collections.abc import Generator

import httpx
import pytest

from exo.api.http.middleware import WARNING_HEADER
from exo.serving.pictures.prompt_pictures import UNSEEN
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.picture_requests import (
    ASKED,
    CAT,
    DIALECTS,
    DOG,
    Json,
    Make,
    anthropic_part,
    chat,
    messages,
    openai_part,
    responses,
    text_of,
)
from tests.support.pictures import picture_file, png_of, random_png

SEES, BLIND = "fake/sees", "fake/blind"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    cards = (
        fake_card(SEES, chat_template=CHAT_TEMPLATE, mmproj="mmproj.gguf"),
        fake_card(BLIND, chat_template=CHAT_TEMPLATE),
    )
    with (
        serve(tmp_path_factory.mktemp("server"), *cards) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def ask(http: httpx.Client, request: tuple[str, Json]) -> httpx.Response:
    path, body = request
    return http.post(path, json=body)


def refused(http: httpx.Client, request: tuple[str, Json]) -> str:
    reply = ask(http, request)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    return error if isinstance(error, str) else error["message"]


def test_all_dialects_show_the_model_the_same_picture(http: httpx.Client) -> None:
    cats = {text_of(ask(http, make(CAT, SEES))) for make in DIALECTS.values()}
    dogs = {text_of(ask(http, make(DOG, SEES))) for make in DIALECTS.values()}
    assert len(cats) == len(dogs) == 1
    assert cats != dogs


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_formats_without_loss_are_one_picture(http: httpx.Client, kind: str) -> None:
    plain = text_of(ask(http, chat(b64encode(picture_file("PNG")).decode(), SEES)))
    assert text_of(ask(http, chat(b64encode(picture_file(kind)).decode(), SEES))) == plain


def test_jpeg_is_read_and_metadata_do_not_matter(http: httpx.Client) -> None:
    first, second = (b64encode(picture_file("JPEG", comment=comment)).decode() for comment in ("a", "b"))
    assert first != second
    assert text_of(ask(http, chat(first, SEES))) == text_of(ask(http, chat(second, SEES)))


@pytest.mark.parametrize(("field", "make"), DIALECTS.items())
def test_a_model_that_sees_nothing_refuses_a_picture_by_its_field(http: httpx.Client, field: str, make: Make) -> None:
    assert f"'{field}' needs vision" in refused(http, make(CAT, BLIND))


@pytest.mark.parametrize(("field", "make"), DIALECTS.items())
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("no base64!", "is not base64"),
        ("", "is none of PNG, JPEG, WEBP, GIF"),
        (b64encode(b"<svg></svg>").decode(), "is none of PNG, JPEG, WEBP, GIF"),
        (b64encode(random_png(1)[:200]).decode(), "cannot be decoded"),
        (b64encode(png_of(20_000, 20_000, zlib.compress(bytes(1 << 20)))).decode(), "has 20000 x 20000 pixels"),
    ],
)
def test_a_broken_picture_is_refused_by_its_field(
    http: httpx.Client, field: str, make: Make, data: str, reason: str
) -> None:
    message = refused(http, make(data, SEES))
    assert message.startswith(f"{field}: the picture ")
    assert reason in message


@pytest.mark.parametrize("make", [chat, responses, messages])
def test_a_stated_type_that_is_none_of_the_accepted_is_refused(http: httpx.Client, make: Make) -> None:
    path, body = make(CAT, SEES)
    named = json.loads(json.dumps(body).replace("image/png", "image/svg+xml"))
    assert "accepted types are image/png, image/jpeg, image/webp and image/gif" in refused(http, (path, named))


def user(*parts: Json) -> tuple[str, Json]:
    turns = [{"role": "user", "content": [*parts]}]
    return "/v1/chat/completions", {"model": SEES, "messages": turns, "max_tokens": 20, "temperature": 0}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"image_url": {"url": "data:image/svg+xml;base64,eA=="}}, "image_url: accepted types are image/png"),
        ({"image_url": {"url": "data:image/png,x"}}, "image_url: a data: URL must have its content in base64"),
        ({"image_url": {"url": "file:///etc/passwd"}}, "image_url: must be a data: or http URL"),
        ({"image_url": {"url": 5}}, "image_url: must be a data: URL"),
        ({}, "image_url: must be a data: URL"),
        ({"image_url": "https://example.org/x.png"}, "image_url: this server fetches no pictures"),
        ({"image_url": "http://127.0.0.1/x.png"}, "image_url: this server fetches no pictures"),
    ],
)
def test_a_part_that_is_no_picture_is_refused_by_its_field(http: httpx.Client, part: Json, message: str) -> None:
    told = refused(http, user({"type": "text", "text": ASKED}, {"type": "image_url", **part}))
    assert told.startswith(f"messages.0.content.1.{message}")


def test_the_place_of_a_picture_and_of_line_breaks(http: httpx.Client) -> None:
    """There is a line break between two texts, and none beside a picture."""
    text = {"type": "text", "text": "a"}
    parts = [text, text, openai_part(CAT), text]
    spelt = [{"type": "text", "text": "a\na"}, openai_part(CAT), {"type": "text", "text": "a"}]
    moved = [openai_part(CAT), text, text, text]
    first, second, third = (text_of(ask(http, user(*each))) for each in (parts, spelt, moved))
    assert first == second != third


CALL = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look"}}]}


def history(model: str, *rest: Json) -> tuple[str, Json]:
    result = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "taken"}, openai_part(CAT)]}
    return "/v1/chat/completions", {
        "model": model,
        "messages": [{"role": "user", "content": "look"}, CALL, result, *rest],
    }


def test_a_result_with_a_picture_is_seen_or_replaced_once_it_is_answered(http: httpx.Client) -> None:
    go_on = {"role": "user", "content": "go on"}
    replaced = ask(http, history(BLIND, go_on))
    assert replaced.status_code == 200
    assert f"messages.content.image_url: the model reads '{UNSEEN}'" in replaced.headers[WARNING_HEADER]
    seen = ask(http, history(SEES, go_on))
    assert WARNING_HEADER not in seen.headers
    assert seen.json()["usage"]["prompt_tokens"] < replaced.json()["usage"]["prompt_tokens"]
    assert "'messages.2.content.1.image_url' needs vision" in refused(http, history(BLIND))
    assert ask(http, history(SEES)).status_code == 200


def test_anthropics_results_may_have_pictures(http: httpx.Client) -> None:
    def body(model: str, data: str) -> tuple[str, Json]:
        called: Json = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]}
        result = {"type": "tool_result", "tool_use_id": "t", "content": [anthropic_part(data)]}
        turns: list[Json] = [{"role": "user", "content": "look"}, called, {"role": "user", "content": [result]}]
        return "/v1/messages", {"model": model, "max_tokens": 20, "temperature": 0, "messages": turns}

    cat, dog = (text_of(ask(http, body(SEES, data))) for data in (CAT, DOG))
    assert cat != dog
    assert "'messages.2.content.0.content.0.source' needs vision" in refused(http, body(BLIND, CAT))


def test_a_stored_response_keeps_its_pictures(http: httpx.Client) -> None:
    first = ask(http, responses(CAT, SEES)).json()
    follow: Json = {"model": SEES, "input": "and now?", "max_output_tokens": 20, "temperature": 0}
    continued = http.post("/v1/responses", json={**follow, "previous_response_id": first["id"]})
    content = responses(CAT, SEES)[1]["input"][0]
    said = {"role": "assistant", "content": text_of(ask(http, responses(CAT, SEES)))}
    whole = http.post(
        "/v1/responses", json={**follow, "input": [content, said, {"role": "user", "content": "and now?"}]}
    )
    assert text_of(continued) == text_of(whole)
    items = http.get(f"/v1/responses/{first['id']}/input_items").json()["data"]
    assert items[0]["content"][0]["text"] == f"{UNSEEN}\n{ASKED}"
    blind = http.post("/v1/responses", json={**follow, "model": BLIND, "previous_response_id": first["id"]})
    assert "'previous_response_id' needs vision" in blind.json()["error"]["message"]
    reference = {"type": "item_reference", "id": items[0]["id"]}
    again = http.post("/v1/responses", json={**follow, "input": [reference]})
    assert text_of(again) == text_of(ask(http, responses(CAT, SEES)))


def test_tokens_of_pictures_are_counted_by_the_model_alone(http: httpx.Client) -> None:
    path, body = messages(CAT, SEES)
    counted = {name: body[name] for name in ("model", "messages")}
    error = refused(http, ("/v1/messages/count_tokens", counted))
    assert error.startswith("messages.0.content.0.source: only the model itself counts a picture's tokens")
    usage = http.post(path, json={**body, "max_tokens": 0}).json()["usage"]
    assert usage["input_tokens"] > len(ASKED)
    blind = refused(http, ("/v1/messages/count_tokens", {**counted, "model": BLIND}))
    assert blind.startswith("messages.0.content.0.source: fake/blind sees no pictures")


def test_lists_tell_which_models_see(http: httpx.Client) -> None:
    models = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
    assert models[SEES]["architecture"]["input_modalities"] == ["text", "image"]
    assert models[BLIND]["architecture"]["input_modalities"] == ["text"]
    assert "vision" in http.post("/api/show", json={"model": SEES}).json()["capabilities"]


def test_a_mark_in_a_text_is_text(http: httpx.Client) -> None:
    """Nobody can write the mark of a picture: it is random."""
    forged = f"\ufdd2{'0' * 16}\ufdd3"
    assert ask(http, user({"type": "text", "text": forged}, openai_part(CAT))).status_code == 200


def test_more_pictures_than_are_accepted(http: httpx.Client) -> None:
    assert "at most 100 pictures" in refused(http, user(*[openai_part(CAT)] * 101))
