"""Pictures of prompts in the engine: their places among the tokens, and the thread that encodes them."""

import hashlib
import threading
from functools import partial
from queue import SimpleQueue

import numpy as np

from exo.worker.protocol.commands import Picture, Prompt, Text
from exo.worker.runner_common.pictures import PictureError, Png
from exo.worker.runner_cuda.prefix.state_file import be_nice
from exo.worker.runner_cuda.tokenizer import GgufTokenizer
from exo.worker.runner_cuda.vision.projector import EncodingStoppedError, Extent, Projector, ProjectorError
from exo.worker.runner_cuda.vision.span import STILL, SeenPicture, Span

_CLOSING_SECONDS = 1.0
"""How long ``Sight.close`` waits for a picture that is being encoded."""


class Sight:
    """Finds the pictures of prompts, and encodes them in a thread of its own, so that no stream waits for it."""

    def __init__(self, projector: Projector, tokenizer: GgufTokenizer, identity: str, most_rows: int) -> None:
        """``identity`` identifies the projector. A picture that is computed whole has at most ``most_rows`` tokens."""
        self._projector = projector
        self._tokenizer = tokenizer
        self.is_flat = projector.is_flat
        """Whether tokens of a picture share positions."""
        self._identity = identity.encode()
        self._most_rows = most_rows
        self._latest: tuple[Prompt, list[int], list[Span]] = (), [], []
        self._closing = False
        self._asked: SimpleQueue[SeenPicture | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._encode_asked, name="pictures", daemon=True)
        self._thread.start()

    def encode_prompt(self, prompt: Prompt) -> tuple[list[int], list[Span]]:
        """Returns the tokens of a prompt with pictures, BOS in front where due, and the places of the pictures.

        Remembers the latest prompt, which several sequences may share. Raises PictureError.
        """
        if prompt is not self._latest[0]:
            self._latest = (prompt, *self._encoded(prompt))
        return self._latest[1].copy(), self._latest[2]

    def is_ready(self, picture: SeenPicture) -> bool:
        """Whether a picture is encoded. Has it encoded if it is not."""
        if not (picture.asked or picture.parts or picture.fault):
            picture.asked = True
            self._asked.put(picture)
        return bool(picture.parts)

    @property
    def n_steps(self) -> int:
        """Grows while a picture is encoded."""
        return self._projector.n_steps

    def close(self) -> None:
        """Frees the projector. One that does not end its work soon is left to the end of the process."""
        self._closing = True
        self._asked.put(None)
        self._thread.join(_CLOSING_SECONDS)
        if not self._thread.is_alive():
            self._projector.free()

    def _encoded(self, prompt: Prompt) -> tuple[list[int], list[Span]]:
        tokens, spans, number = list[int](), list[Span](), 0
        for part in prompt:
            if isinstance(part, Text):
                tokens += self._tokenizer.encode((part,), add_bos=False)
            elif isinstance(part, Picture):
                number += 1
                self._add(Png(number, part), tokens, spans)
        if spans and tokens[-1] < 0:
            raise PictureError(number, "no text follows it, and a prompt must end with text")
        bos = self._tokenizer.bos
        if self._tokenizer.adds_bos and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
            spans = [each.moved(1) for each in spans]
        return tokens, spans

    def _add(self, png: Png, tokens: list[int], spans: list[Span]) -> None:
        """Adds a picture to the tokens and spans of a prompt. Raises PictureError."""
        try:
            pieces = self._projector.pieces(png.width, png.height)
        except ProjectorError as error:
            raise PictureError(png.number, str(error)) from error
        picture, digest, part = SeenPicture(png), hashlib.sha256(self._identity + png.data).digest(), 0
        for piece in pieces:
            if isinstance(piece, list):
                tokens += piece
                continue
            if self._projector.whole and piece.tokens > self._most_rows:
                reason = f"its {piece.tokens} tokens are computed in one step, which has at most {self._most_rows}"
                raise PictureError(png.number, f"{reason}; n_ubatch in [cuda] of the model card sets that")
            stop, whole = len(tokens) + piece.tokens, self._projector.whole
            spans.append(Span(len(tokens), stop, picture, part, piece.positions, whole))
            tokens += _ids(digest, part, piece)
            part += 1

    def _encode_asked(self) -> None:
        be_nice()
        while (picture := self._asked.get()) is not None:
            png = picture.png
            try:
                goes_on = partial(self._is_wanted, picture)
                picture.parts = self._projector.encode(png.width, png.height, png.rgb(), goes_on)
            except EncodingStoppedError:
                pass
            except PictureError as error:
                picture.fault = str(error)
            except ProjectorError as error:
                picture.fault = f"picture {png.number}: {error}"
            picture.asked = False

    def _is_wanted(self, picture: SeenPicture) -> bool:
        return picture.users > 0 and not self._closing


def _ids(digest: bytes, part: int, extent: Extent) -> list[int]:
    """Returns negative numbers that stand for the tokens of a part of a picture in the prefix cache.

    The number of ids that are ``STILL`` or more equals the number of positions of the part.
    """
    data = hashlib.shake_256(digest + part.to_bytes(4, "little")).digest(4 * extent.tokens)
    ids = np.frombuffer(data, np.int32) | np.int32(STILL)
    ids[extent.positions :] &= np.int32(~(1 << 30))
    return ids.tolist()
