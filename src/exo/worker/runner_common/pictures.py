"""The pictures of a prompt: their sizes, and their pixels."""

import binascii
from base64 import b64decode
from io import BytesIO

from exo.worker.protocol.commands import Picture, Prompt
from exo.worker.protocol.messages import PICTURE_PIXELS

MOST_RATIO = 200
"""The largest ratio of a picture's sides. Engines scale a picture to their own size and round the shorter side."""
_PLAIN = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\x08\x02\0\0\0"
"""The bytes before a PNG's sizes, and those after them: 8-bit RGB, not interlaced."""


class PictureError(Exception):
    """A picture that no model can see. The message is a phrase such as "picture 2: it has no pixels"."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"picture {number}: {reason}")


class Png:
    """A picture whose pixels are not decoded yet. ``number`` is its place in the prompt, from 1."""

    def __init__(self, number: int, picture: Picture) -> None:
        """Raises PictureError."""
        self.number = number
        try:
            self.data = b64decode(picture.png, validate=True)
        except (binascii.Error, ValueError):
            raise PictureError(number, "its PNG is not in base64") from None
        start, sizes, end = self.data[:16], self.data[16:24], self.data[24:29]
        if (start, end) != _PLAIN:
            raise PictureError(number, "it is no PNG with 8-bit RGB pixels that are not interlaced")
        self.width, self.height = (int.from_bytes(each, "big") for each in (sizes[:4], sizes[4:]))
        size = f"{self.width} x {self.height} pixels"
        if not 0 < self.width * self.height <= PICTURE_PIXELS:
            raise PictureError(number, f"it has {size}; accepted are 1 to {PICTURE_PIXELS} pixels")
        if max(self.width, self.height) > MOST_RATIO * min(self.width, self.height):
            raise PictureError(number, f"it has {size}; one side may be at most {MOST_RATIO} times the other")

    def rgb(self) -> bytes:
        """Returns three bytes for each pixel, row by row. Raises PictureError."""
        from PIL import Image  # most runners never see a picture

        try:
            with Image.open(BytesIO(self.data), formats=("PNG",)) as image:
                return image.tobytes()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise PictureError(self.number, f"its PNG is damaged ({error})") from error


def has_pictures(prompt: Prompt) -> bool:
    """Whether a prompt has a picture."""
    return any(isinstance(part, Picture) for part in prompt)
