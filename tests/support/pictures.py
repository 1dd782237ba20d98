"""Random pictures, as a prompt has them."""

from base64 import b64encode
from io import BytesIO

import numpy as np
from PIL import Image

from exo.worker.protocol.commands import Picture


def random_png(seed: int, width: int = 64, height: int = 48) -> bytes:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture_of(png: bytes) -> Picture:
    return Picture(png=b64encode(png).decode())


def random_picture(seed: int, width: int = 64, height: int = 48) -> Picture:
    return picture_of(random_png(seed, width, height))
