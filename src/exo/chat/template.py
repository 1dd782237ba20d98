"""Chat templates: messages to prompt, through the process of ``exo.chat.render``."""

import json
import os
import sys
from collections.abc import Mapping, Sequence

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import JsonValue

from exo.chat.literal import OPEN, special_tokens
from exo.chat.render import OUTPUT_LIMIT, SECONDS
from exo.worker.messages import Capabilities, Text

_ANSWER_LIMIT = 12 * OUTPUT_LIMIT + 1024
"""Bytes of one answer line: JSON spends up to twelve on one character."""


class TemplateError(Exception):
    """The chat template cannot be used: it is faulty, too slow, or asks for too much."""


class ConversationRefusedError(Exception):
    """The chat template itself refused the messages; the text is the template's own."""


class PromptTooLongError(Exception):
    """The prompt cannot fit the context, whatever its tokens turn out to be."""


class TemplateWorker:
    """One rendering process, started when first needed and replaced when it dies or is late.

    Requests take turns; one takes about a tenth of a millisecond.
    """

    def __init__(self) -> None:
        self._turn = anyio.Lock()
        self._process: Process | None = None
        self._answers: BufferedByteReceiveStream | None = None

    async def prepare(self, source: str) -> None:
        """Starts the process and compiles ``source``, so that the first request need not. Raises ``TemplateError``."""
        await self._ask({"source": source})

    async def render(self, source: str, variables: Mapping[str, object]) -> str:
        """The rendered text. Raises ``TemplateError`` and ``ConversationRefusedError``."""
        return await self._ask({"source": source, "variables": variables})

    async def aclose(self) -> None:
        """Ends the process, which has nothing to lose."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.aclose()

    async def _ask(self, request: Mapping[str, object]) -> str:
        line = json.dumps(request).encode() + b"\n"
        async with self._turn:
            try:
                with anyio.fail_after(SECONDS):
                    answer = await self._exchange(line)
            except TimeoutError:
                await self.aclose()
                raise TemplateError(f"the chat template took longer than {SECONDS} s") from None
            except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
                await self.aclose()
                raise TemplateError("the chat template ended the process that renders it") from None
            except BaseException:
                await self.aclose()  # an answer nobody waits for would be taken for the next one's
                raise
        if "raised" in answer:
            raise ConversationRefusedError(answer["raised"])
        if "error" in answer:
            raise TemplateError(f"the chat template failed: {answer['error']}")
        return answer["text"]

    async def _exchange(self, line: bytes) -> dict[str, str]:
        if self._process is None or self._answers is None:
            self._process, self._answers = await _start()
        assert self._process.stdin is not None
        await self._process.stdin.send(line)
        return json.loads(await self._answers.receive_until(b"\n", _ANSWER_LIMIT))


async def _start() -> tuple[Process, BufferedByteReceiveStream]:
    """The process gets none of the server's environment and does not share the terminal's signals."""
    process = await anyio.open_process(
        [sys.executable, "-P", "-m", "exo.chat.render"],
        stderr=None,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, BufferedByteReceiveStream(process.stdout)


async def chat_prompt(
    worker: TemplateWorker, model: Capabilities, messages: Sequence[Mapping[str, JsonValue]]
) -> tuple[Text, ...]:
    """The prompt that ``model.chat_template`` makes of ``messages``, which each have at least a ``role``.

    What a message says is taken literally, special tokens in it included. A template that writes the BOS text itself
    does not double it: the runner's tokenizer adds BOS only where the prompt does not begin with it.

    Raises ``TemplateError``, ``ConversationRefusedError``, ``NoncharacterError`` and ``PromptTooLongError``.
    """
    assert model.chat_template is not None
    tokens = special_tokens(model.special_tokens)
    # "developer" is the newer name of "system"; only templates made since know it.
    renamed = {} if "developer" in model.chat_template else {"developer": "system"}
    marked: list[dict[str, object]] = []
    for message in messages:
        role = str(message["role"])
        said = {key: tokens.mark(value) for key, value in message.items() if key != "role"}
        marked.append({"role": renamed.get(role, role), **said})
    variables: dict[str, object] = {
        "messages": marked,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": model.bos_token,
        "eos_token": model.eos_token,
    }
    text = await worker.render(model.chat_template, variables)
    if (places := text.count(OPEN)) > model.context_length:  # each is at least one token, and costs time to split off
        raise PromptTooLongError(
            f"the prompt has at least {places} tokens, but the context holds {model.context_length}"
        )
    return tokens.split(text)
