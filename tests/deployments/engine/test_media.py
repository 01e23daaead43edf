from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deployments.engine.media import ImageRejected, Media, decode_base64, decode_control, save
from deployments.spec.formats import FILE_TYPES

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_png_keeps_every_pixel_and_carries_the_manifest(tmp_path: Path) -> None:
    manifest = {"seed": 42, "prompt": "ein Fuchs im Schnee, 狐"}
    save(Media(PIXELS), "png", manifest, tmp_path / "0.png")
    assert FILE_TYPES["png"] == ("png", "image/png")
    assert Media(PIXELS).measures == {"width": 40, "height": 24}
    image = Image.open(tmp_path / "0.png")
    assert np.array_equal(np.asarray(image), PIXELS)
    assert json.loads(image.text["lora-serve"]) == manifest  # type: ignore[attr-defined]


@pytest.mark.parametrize(("format", "extension"), [("jpeg", "jpg"), ("webp", "webp")])
def test_lossy_formats_have_quality_95(
    tmp_path: Path, format: Literal["jpeg", "webp"], extension: str
) -> None:
    save(Media(PIXELS), format, {}, tmp_path / "0")
    assert FILE_TYPES[format] == (extension, f"image/{format}")
    assert (tmp_path / "0").read_bytes() == saved(Image.fromarray(PIXELS), format, quality=95)


def test_alpha_is_dropped_not_composited() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode_control(saved(image, "PNG"), 16).getpixel((0, 0)) == (10, 20, 30)


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_control(data, 16).getpixel((0, 0)) == (255, 0, 0)


def test_exif_does_not_rotate() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_control(saved(Image.new("RGB", (8, 4)), "JPEG", exif=exif), 32).size == (8, 4)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("WEBP", "RGBA"),
        ("GIF", "P"),
        ("BMP", "1"),
    ],
)
def test_formats_and_modes(format: str, mode: str) -> None:
    decoded = decode_control(saved(Image.new(mode, (6, 5)), format), 30)
    assert (decoded.mode, decoded.size) == ("RGB", (6, 5))


def test_too_many_pixels_are_refused_before_decoding() -> None:
    # The header claims 50,000 x 50,000 pixels; the rest of the file is missing.
    head = saved(Image.new("RGB", (1, 1)), "PNG")
    ihdr = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb = head[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + head[33:]
    for bound in (16, 10**8):
        with pytest.raises(ImageRejected, match=f"larger than {bound} pixels"):
            decode_control(bomb, bound)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a PNG"),
        (b"<html></html>", "not a PNG"),
        (saved(Image.new("RGB", (9, 9)), "TIFF"), "not a PNG"),
        (saved(Image.fromarray(PIXELS), "PNG")[:-60], "damaged"),
        (saved(Image.fromarray(PIXELS), "JPEG")[:-60], "damaged"),
    ],
)
def test_what_is_no_image(data: bytes, words: str) -> None:
    with pytest.raises(ImageRejected, match=words):
        decode_control(data, 10**6)


SAMPLES = [saved(Image.fromarray(PIXELS), name) for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]


@settings(max_examples=200)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_images_decode_or_are_rejected(sample: bytes, data: st.DataObject) -> None:
    damaged = bytearray(sample)
    for _ in range(3):
        damaged[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_control(bytes(damaged[: data.draw(st.integers(1, len(sample)))]), 10**6).mode == "RGB"
    except ImageRejected as error:
        assert str(error).startswith("The control image is")


def test_base64() -> None:
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[n : n + 60] for n in range(0, len(text), 60))
    for form in (text, wrapped, f"data:image/png;base64,{text}", f"DATA:;BASE64,\r\n {wrapped}\t"):
        assert decode_base64(form) == data


@pytest.mark.parametrize(
    "text", ["a", "ab=c", "a-_b", "!!", "data:image/png,abcd", "data:image/png;base64", "é==="]
)
def test_bad_base64(text: str) -> None:
    with pytest.raises(ImageRejected, match="base64"):
        decode_base64(text)


def test_what_the_gateway_needs_imports_no_torch() -> None:
    modules = (
        "engine.media",
        "engine.checkpoints",
        "loras.format.header",
        "loras.format.dialects",
        "loras.sources.lora_root",
        "spec.lora_reference",
    )
    code = "".join(f"import deployments.{module}\n" for module in modules)
    code += "import sys\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
