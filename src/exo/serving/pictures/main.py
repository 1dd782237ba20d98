"""The sandbox program that decodes pictures, which come from strangers and may be hostile.

A request has the ``data`` of a file in base64. The answer has the ``png`` in base64, or the ``error``, which continues
a sentence whose subject is the picture.
"""

import json
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from io import BytesIO

from PIL import Image, ImageOps

from exo.serving.pictures.limits import FORMATS, LIMITS, MOST_PIXELS, MOST_RATIO
from exo.worker.protocol.messages import PICTURE_PIXELS
from exo.worker.runner_common.sandbox import serve

Image.MAX_IMAGE_PIXELS = None  # ``decoded`` has a limit of its own
_DIRECT = ("RGB", "L", "1")
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError)


def decoded(data: bytes) -> bytes:
    """Returns the first frame as a PNG of at most ``PICTURE_PIXELS``, upright, without transparency and metadata.

    The same file gives the same bytes. Raises ValueError, whose message continues a sentence about the picture, and
    what Pillow raises.
    """
    with Image.open(BytesIO(data), formats=FORMATS) as file:
        width, height = file.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"has {width} x {height} pixels; at most {MOST_PIXELS:,} are accepted")
        if max(width, height) > MOST_RATIO * min(width, height):
            raise ValueError(f"has {width} x {height} pixels; one side may be at most {MOST_RATIO} times the other")
        file.draft("RGB", _scaled(width, height))
        file.load()
        picture = ImageOps.exif_transpose(file)
    if picture.mode not in _DIRECT:
        layered = picture.convert("RGBA")
        picture = Image.new("RGB", layered.size, "white")
        picture.paste(layered, mask=layered.getchannel("A"))
    picture = picture.convert("RGB")
    if picture.width * picture.height > PICTURE_PIXELS:
        picture = picture.resize(_scaled(*picture.size), Image.Resampling.LANCZOS)
    png = BytesIO()
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(png, "PNG", compress_level=1)
    return png.getvalue()


def _scaled(width: int, height: int) -> tuple[int, int]:
    factor = min(1.0, (PICTURE_PIXELS / (width * height)) ** 0.5)
    return max(1, int(width * factor)), max(1, int(height * factor))


def answer(line: bytes) -> dict[str, str]:
    """Returns the answer to one request line."""
    try:
        data = b64decode("".join(json.loads(line)["data"].split()), validate=True)
    except Base64Error:
        return {"error": "is not base64"}
    try:
        return {"png": b64encode(decoded(data)).decode()}
    except Image.UnidentifiedImageError:
        return {"error": f"is none of {', '.join(FORMATS)}"}
    except _UNREADABLE as error:
        known = isinstance(error, ValueError) and str(error).startswith("has ")
        return {"error": str(error) if known else f"cannot be decoded: {str(error)[:200] or type(error).__name__}"}


if __name__ == "__main__":
    serve(lambda _: answer, LIMITS)
