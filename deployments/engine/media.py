"""Converts media between arrays and files: encodes outputs, decodes control images. Imports no torch."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from deployments.engine.videos import Sound, write_mp4, write_webp
from deployments.spec.formats import OutputFormat

QUALITY = 95
"""Quality of JPEG and lossy WEBP pictures; the reference server saves JPEG with it."""

MANIFEST_KEY = "lora-serve"
"""Keyword of the PNG text chunk that holds the manifest as JSON."""

_PIECE = 2**20
"""Characters of base64 decoded per call. One call for 64 MB would hold the GIL for half a second."""

_CONTROL_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class ImageRejected(ValueError):
    """A control image that cannot be used. The text is a sentence for the client."""


class ImageTooLarge(ImageRejected):
    """A control image with more pixels than allowed."""


@dataclass(frozen=True, slots=True)
class Media:
    """A rendered prompt before any encoding: uint8, RGB, H x W x 3, or F x H x W x 3 for a video.

    `fps` is the number of frames per second of a video, None for a picture. Some videos have sound.
    """

    pixels: np.ndarray
    fps: int | None = None
    sound: Sound | None = None

    @property
    def measures(self) -> dict[str, int]:
        """Width and height in pixels; for a video also `num_frames` and `fps`."""
        *frames, height, width, _ = self.pixels.shape
        size = {"width": width, "height": height}
        return size if self.fps is None else {**size, "num_frames": frames[0], "fps": self.fps}


def save(
    media: Media,
    format: OutputFormat,
    manifest: Mapping[str, Any],
    path: Path,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Encode a picture (jpeg, png, webp) or a video (webp, mp4) to `path`, whose suffix fits the format.

    PNG keeps every pixel and holds the manifest. JPEG and WEBP pictures have quality 95. `moved` is called
    for each frame of a video and may raise to stop encoding. Raises `OSError`.
    """
    if media.fps is None:
        _save_picture(Image.fromarray(media.pixels), format, manifest, path)
    elif format == "mp4":
        write_mp4(media.pixels, media.fps, path, moved, media.sound)
    else:
        write_webp(media.pixels, media.fps, path, moved)


def _save_picture(image: Image.Image, format: OutputFormat, manifest: Mapping[str, Any], path: Path) -> None:
    if format == "png":
        text = PngInfo()
        text.add_itxt(MANIFEST_KEY, json.dumps(manifest, ensure_ascii=False))
        image.save(path, "PNG", pnginfo=text)
    else:
        image.save(path, format, quality=QUALITY)


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
        raise ImageRejected("The control image is not a PNG, JPEG, WEBP, GIF or BMP picture.") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"The control image is larger than {max_pixels} pixels.") from error
    except ImageRejected:
        raise
    except Exception as error:
        # Pillow's decoders raise many types: OSError, SyntaxError, struct.error, ...
        raise ImageRejected("The control image is damaged or truncated.") from error


def decode_base64(text: str) -> bytes:
    """Decode base64 with or without a `data:...;base64,` prefix. White space is ignored.

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
