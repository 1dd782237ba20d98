"""Adds the tokens before, between and after texts that become a vector or a score.

They are the same as in llama.cpp's server (``format_prompt_rerank`` in tools/server), so that the results are too.
"""

import re

import llama_cpp

from exo.worker.protocol.commands import Embed, Prompt, Rank, Text
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.tokenizer import GgufTokenizer


class EmbeddingInput:
    """Makes the token ids of whole texts. Safe to call from any thread."""

    def __init__(self, model: Model, tokenizer: GgufTokenizer) -> None:
        vocab = model.vocab
        sep = int(llama_cpp.llama_vocab_sep(vocab))  # pyright: ignore[reportArgumentType]
        eos = tokenizer.eos if tokenizer.eos >= 0 else sep
        wordpiece = llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM
        adds_eos, adds_sep = llama_cpp.llama_vocab_get_add_eos(vocab), llama_cpp.llama_vocab_get_add_sep(vocab)
        self._tokenizer = tokenizer
        self._before = _known(tokenizer.adds_bos or wordpiece, tokenizer.bos)
        self.closing = _known(True, sep) if wordpiece else _known(adds_eos, eos)
        self._between = _known(adds_eos, eos) + _known(adds_sep, sep)
        self._after_pair = _known(adds_eos, eos)
        template = llama_cpp.llama_model_chat_template(model.handle, b"rerank")
        self._template = template.decode(errors="replace") if template else None

    def tokens(self, request: Embed | Rank) -> list[int]:
        """Returns the token ids of a text to embed, or of a query and its document."""
        if isinstance(request, Embed):
            return self._text(request.prompt)
        return self._pair(request.query, request.document)

    def _text(self, prompt: Prompt) -> list[int]:
        """Returns the tokens of a text to embed. Token ids stay as given; text gets the tokens around it if missing."""
        tokens = self._tokenizer.encode(prompt, add_bos=False)
        if not any(isinstance(part, Text) for part in prompt):
            return tokens
        before = [] if tokens[: len(self._before)] == self._before else self._before
        after = [] if self.closing and tokens[-len(self.closing) :] == self.closing else self.closing
        return [*before, *tokens, *after]

    def _pair(self, query: str, document: str) -> list[int]:
        """Returns the tokens of a query and a document, in the file's own template or joined by control tokens."""
        if self._template is not None:
            return self._tokenizer.encode(self._fill(self._template, query, document), add_bos=False)
        first, second = (self._tokenizer.encode((Text(text=each),), add_bos=False) for each in (query, document))
        return [*self._before, *first, *self._between, *second, *self._after_pair]

    def _fill(self, template: str, query: str, document: str) -> tuple[Text, ...]:
        """Fills in the template. Its control tokens are special; the same strings in the texts are ordinary text."""
        special = sorted(filter(None, self._tokenizer.special), key=len, reverse=True)
        values = {"{query}": query, "{document}": document}
        parts: list[Text] = []
        for piece in re.split(f"({'|'.join(map(re.escape, special))})", template) if special else [template]:
            if piece in self._tokenizer.special:
                parts.append(Text(text=piece, special=True))
            else:
                parts.append(Text(text=re.sub(r"\{query\}|\{document\}", lambda found: values[found[0]], piece)))
        return tuple(parts)


def _known(wanted: bool, token: int) -> list[int]:
    return [token] if wanted and token >= 0 else []
