"""A request about a picture in each API, and the text of its reply."""

from base64 import b64encode
from collections.abc import Callable
from typing import Any

import httpx

from tests.support.pictures import random_png

ASKED = "what is it?"
CAT, DOG = (b64encode(random_png(seed)).decode() for seed in (1, 2))
Json = dict[str, Any]
Make = Callable[..., tuple[str, Json]]
"""Makes a request about a picture: its path and its body. The reply is greedy and has 20 tokens."""


def data_url(data: str, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{data}"


def openai_part(data: str, kind: str = "image/png") -> Json:
    return {"type": "image_url", "image_url": {"url": data_url(data, kind), "detail": "high"}}


def anthropic_part(data: str, kind: str = "image/png") -> Json:
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def chat(data: str, model: str) -> tuple[str, Json]:
    content = [openai_part(data), {"type": "text", "text": ASKED}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 20, "temperature": 0}
    return "/v1/chat/completions", body


def responses(data: str, model: str) -> tuple[str, Json]:
    content = [{"type": "input_image", "image_url": data_url(data)}, {"type": "input_text", "text": ASKED}]
    body = {"input": [{"role": "user", "content": content}], "max_output_tokens": 20, "temperature": 0}
    return "/v1/responses", {"model": model, **body}


def messages(data: str, model: str) -> tuple[str, Json]:
    content = [anthropic_part(data), {"type": "text", "text": ASKED}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 20, "temperature": 0}
    return "/v1/messages", body


OPTIONS = {"num_predict": 20, "temperature": 0}


def ollama_chat(data: str, model: str) -> tuple[str, Json]:
    message = {"role": "user", "content": ASKED, "images": [data]}
    return "/api/chat", {"model": model, "messages": [message], "stream": False, "options": OPTIONS}


def ollama_generate(data: str, model: str) -> tuple[str, Json]:
    body = {"prompt": ASKED, "images": [data], "stream": False, "options": OPTIONS}
    return "/api/generate", {"model": model, **body}


DIALECTS = {
    "messages.0.content.0.image_url": chat,
    "input.0.content.0.image_url": responses,
    "messages.0.content.0.source": messages,
    "messages.0.images.0": ollama_chat,
    "images.0": ollama_generate,
}
"""By the field of their picture."""


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    body = reply.json()
    if "output" in body:
        return body["output"][0]["content"][0]["text"]
    if "choices" in body:
        return body["choices"][0]["message"]["content"]
    if "response" in body:
        return body["response"]
    return body["content"][0]["text"] if "content" in body else body["message"]["content"]
