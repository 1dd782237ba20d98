"""The decoding of pictures, hostile ones too, and of what models get to see of them."""

import json
import zlib
from base64 import b64encode
from io import BytesIO

import pytest
from PIL import Image

from exo.serving.pictures.fetch import is_public
from exo.serving.pictures.limits import FORMATS
from exo.serving.pictures.main import answer, decoded
from exo.serving.pictures.prompt_pictures import joined
from exo.worker.protocol.messages import PICTURE_PIXELS
from tests.support.pictures import picture_file, png_of, random_png


def shown(file: bytes) -> Image.Image:
    return Image.open(BytesIO(decoded(file)))


def error(file: bytes) -> str:
    return answer(json.dumps({"data": b64encode(file).decode()}).encode())["error"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_every_format_becomes_a_plain_png(kind: str, mode: str) -> None:
    picture = shown(picture_file(kind, mode=mode if (kind, mode) != ("JPEG", "P") else "CMYK"))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (24, 16))
    assert picture.info == {}


def test_transparency_is_white_and_the_first_frame_is_shown() -> None:
    clear = BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear, "PNG")
    assert shown(clear.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    moving = BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    assert shown(moving.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = shown(picture_file("JPEG", exif=exif))
    assert turned.size == (16, 24)


def test_a_large_picture_is_scaled_down_in_proportion() -> None:
    large = BytesIO()
    Image.new("L", (4000, 2000)).save(large, "PNG")
    width, height = shown(large.getvalue()).size
    assert width * height <= PICTURE_PIXELS
    assert width / height == pytest.approx(2, abs=0.01)
    assert shown(random_png(1)).tobytes() == Image.open(BytesIO(random_png(1))).tobytes()


def test_the_same_file_gives_the_same_bytes() -> None:
    assert decoded(picture_file("JPEG")) == decoded(picture_file("JPEG"))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (png_of(20_000, 20_000, zlib.compress(bytes(1 << 20))), "at most"),
        (png_of(1 << 31, 1 << 31, b""), ""),
        (png_of(3000, 8, zlib.compress(bytes(100))), "one side may be at most 100 times the other"),
        (png_of(16, 16, zlib.compress(b"")), "cannot be decoded"),
        (png_of(16, 16, b"not compressed"), "cannot be decoded"),
        (random_png(1)[:-30], "cannot be decoded"),
        (picture_file("JPEG")[:200], ""),
        (picture_file("BMP"), "is none of PNG, JPEG, WEBP, GIF"),
        (b"", "is none of PNG, JPEG, WEBP, GIF"),
        (b"<svg/>", "is none of PNG, JPEG, WEBP, GIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is none of PNG, JPEG, WEBP, GIF"),
    ],
)
def test_hostile_files_have_an_error_and_no_picture(file: bytes, reason: str) -> None:
    assert reason in error(file)


def test_line_breaks_are_between_texts_only() -> None:
    mark = f"\ufdd2{'1' * 16}\ufdd3"
    assert joined([]) == ""
    assert joined(["a", "b"]) == "a\nb"
    assert joined(["a", mark, mark, "b", "c"]) == f"a{mark}{mark}b\nc"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("192.168.1.5", False),
        ("172.16.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public
