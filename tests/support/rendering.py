"""Chat templates rendered by the worker that serves use."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

from pydantic import JsonValue

from exo.chat.template.renderer import TemplateWorker
from exo.worker.protocol.commands import Text
from exo.worker.protocol.events import Capabilities

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


MARKERS = ("<|im_start|>", "<|im_end|>")


def model(template: str | None, special: Sequence[str] = MARKERS) -> Capabilities:
    return Capabilities(
        engine="test",
        engine_version="0",
        backend="LlamaCppCpu",
        context_length=128,
        slots=1,
        vocabulary=1000,
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        special_tokens=tuple(special),
    )


def user(content: str) -> Mapping[str, JsonValue]:
    return {"role": "user", "content": content}


@asynccontextmanager
async def worker() -> AsyncGenerator[TemplateWorker]:
    made = TemplateWorker()
    try:
        yield made
    finally:
        await made.aclose()


def joined(stretches: Sequence[Text]) -> str:
    return "".join(stretch.text for stretch in stretches)
