"""Inputs 42 to 48: control images in the request and from a URL; both use the same decoder."""

from __future__ import annotations

import base64
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.hostile.conftest import QUERY, Stage, request

INVALID, TOO_LARGE = "CONTROL_IMAGE_INVALID", "CONTROL_IMAGE_TOO_LARGE"


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """Return a PNG that claims a size but has only one row of pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(bytes(1 + 3 * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", row)


def gif(frames: int) -> bytes:
    whole = encoded("GIF", "L")
    frame = whole[whole.index(b"\x2c\x00\x00\x00\x00") : -1]
    return whole[:-1] + frame * (frames - 1) + b";"


def animated(format: str, frames: int) -> bytes:
    """Return an animation whose frames all differ, because encoders merge equal ones."""
    pictures = [Image.new("RGB", (16, 16), (index % 256, index // 256, 7)) for index in range(frames)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format, save_all=True, append_images=pictures[1:], duration=20)
    return buffer.getvalue()


def zipped_behind(picture: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"x")
    return picture + buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", size=(64, 96), exif=exif)


def texts(size: int) -> bytes:
    info = PngInfo()
    info.add_text("a", "x" * size, zip=True)
    return encoded("PNG", pnginfo=info)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'

IMAGES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "42 65535 x 65535": (lambda: png(65535, 65535), TOO_LARGE),
    "42 more pixels than a service takes": (lambda: png(8192, 4097), TOO_LARGE),
    "42 a side of 2^31-1": (lambda: png(2**31 - 1, 1), TOO_LARGE),
    "42 a GIF that ends after its size": (lambda: b"GIF89a\xff\xff\xff\xff\x80\x00\x00", INVALID),
    "43 GIF of 10,000 frames": (lambda: gif(10_000), None),
    "43 WEBP of 500 frames": (lambda: animated("WEBP", 500), None),
    "43 APNG of 500 frames": (lambda: animated("PNG", 500), None),
    "44 SVG": (lambda: SVG, INVALID),
    "44 EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", INVALID),
    "44 PDF": (lambda: encoded("PDF"), INVALID),
    "44 TIFF": (lambda: encoded("TIFF"), INVALID),
    "44 ICO": (lambda: encoded("ICO"), INVALID),
    "45 a page": (lambda: b"<html>login</html>", INVALID),
    "45 a script that begins as GIF": (lambda: b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)", INVALID),
    "45 PNG and zip in one": (lambda: zipped_behind(encoded("PNG")), None),
    "46 half a JPEG": (lambda: encoded("JPEG")[:300], INVALID),
    "46 half a PNG": (lambda: encoded("PNG")[:100], INVALID),
    "46 nothing": (lambda: b"", INVALID),
    "47 EXIF that rotates": (rotated, None),
    "47 CMYK": (lambda: encoded("JPEG", "CMYK"), None),
    "47 16 bits": (lambda: encoded("PNG", "I;16"), None),
    "47 alpha": (lambda: encoded("PNG", "RGBA"), None),
    "47 one bit": (lambda: encoded("PNG", "1"), None),
    "47 a profile of 1 MB": (lambda: encoded("JPEG", icc_profile=bytes(10**6)), None),
    "47 a profile of 100 MB": (
        lambda: png(64, 64, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        INVALID,
    ),
    "47 a text of 100 MB": (lambda: texts(10**8), INVALID),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(stage: Stage, name: str) -> None:
    make, code = IMAGES[name]
    data = make()
    url = stage.site.file("/image", data) + QUERY
    assert stage.outcome(request(prompt={"ctrl_img": url})) == code
    # The format is detected from the bytes; the name does not matter.
    sent = request(prompt={"ctrl_img": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"})
    if code is None:
        assert stage.outcome(sent) is None
    else:
        assert stage.refused(sent) == (400, code)


NOT_BASE64 = {
    "48 other characters": "@@@",
    "48 a wrong length": "abc",
    "48 good, then garbage": base64.b64encode(encoded("PNG")).decode() + "@",
    "48 padding in between": "iVBO=Rw0KGgo",
    "48 not ASCII": "ü" * 8,
    "48 an empty data URI": "data:image/png;base64,",
    "48 a data URI that is not base64": "data:image/svg+xml,<svg/>",
    "48 text": base64.b64encode(b"just text").decode(),
}


@pytest.mark.parametrize("name", NOT_BASE64)
def test_what_is_not_base64_of_a_picture(stage: Stage, name: str) -> None:
    """The first prompt's image is valid, but must not be stored either."""
    bad = request()
    bad["prompts"].append({**bad["prompts"][0], "ctrl_img": NOT_BASE64[name]})
    assert stage.refused(bad) == (400, INVALID)
