"""Random pictures, as a prompt has them."""

import struct
import zlib
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


def picture_file(kind: str, size: tuple[int, int] = (24, 16), mode: str = "RGB", **options: object) -> bytes:
    """A file of a format, by Pillow's name, whose picture has few colours, so that only JPEG changes them."""
    width, height = size
    picture = Image.new("RGB", size, "white")
    picture.paste("red", (0, 0, width // 2, height // 2))
    picture.paste("blue", (width // 2, height // 2, width, height))
    file = BytesIO()
    picture.convert(mode).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return file.getvalue()


def png_of(width: int, height: int, data: bytes) -> bytes:
    """A PNG of one bit for each pixel whose head says this, whatever follows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
