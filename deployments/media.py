"""Pictures between arrays and bytes: what pipelines give, what clients send and get. Imports no torch."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from deployments.render import ImageFormat

QUALITY = 95
"""Of JPEG and lossy WEBP, as the reference server saves its JPEG."""

MANIFEST_KEY = "lora-serve"
"""Keyword of the PNG text chunk that holds the manifest as JSON."""

_PIECE = 2**20
"""Characters of base64 decoded at a time: one call for 64 MB would hold the interpreter for half a second."""

_CONTROL_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class ImageRejected(ValueError):
    """A control image that cannot be used; the text is a sentence for its sender."""


class ImageTooLarge(ImageRejected):
    """A control image with more pixels than allowed."""


@dataclass(frozen=True, slots=True)
class Media:
    """What a prompt rendered to, before any encoding: uint8, H x W x 3, RGB."""

    pixels: np.ndarray

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.pixels.shape[0]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file's bytes, and what a store and a client need to know of it; sizes in pixels."""

    data: bytes
    content_type: str
    extension: str
    width: int
    height: int


def encode(media: Media, format: ImageFormat, manifest: Mapping[str, Any]) -> Encoded:
    """Encode a picture. PNG keeps every pixel and carries the manifest; JPEG and WEBP have quality 95."""
    image = Image.fromarray(media.pixels)
    buffer = io.BytesIO()
    if format == "png":
        text = PngInfo()
        text.add_itxt(MANIFEST_KEY, json.dumps(manifest, ensure_ascii=False))
        image.save(buffer, "PNG", pnginfo=text)
    else:
        image.save(buffer, format, quality=QUALITY)
    extension = "jpg" if format == "jpeg" else format
    return Encoded(buffer.getvalue(), f"image/{format}", extension, media.width, media.height)


def decode_control(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a control image to RGB as the reference does: alpha dropped, first frame, no EXIF rotation.

    The size is checked before any pixel is decoded. Raises `ImageRejected`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_CONTROL_FORMATS)
        if image.width * image.height > max_pixels:
            raise ImageTooLarge(f"The control image is larger than {max_pixels} pixels.")
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ImageRejected("The control image is no PNG, JPEG, WEBP, GIF or BMP picture.") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"The control image is larger than {max_pixels} pixels.") from error
    except ImageRejected:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever their format's parser met: OSError, SyntaxError, struct.error, ...
        raise ImageRejected("The control image is damaged or truncated.") from error


def decode_base64(text: str) -> bytes:
    """Decode base64 with or without a `data:...;base64,` prefix; white space is ignored.

    Raises `ImageRejected` for anything else.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ImageRejected("The control image's data URI is not base64.")
    pieces = (re.sub(r"\s+", "", text[start : start + _PIECE]) for start in range(0, len(text), _PIECE))
    text = "".join(pieces)
    if "=" in text[:-2]:
        raise ImageRejected("The control image is not valid base64.")
    try:
        decoded = (
            base64.b64decode(text[start : start + _PIECE], validate=True)
            for start in range(0, len(text), _PIECE)
        )
        return b"".join(decoded)
    except (binascii.Error, ValueError) as error:
        raise ImageRejected("The control image is not valid base64.") from error
