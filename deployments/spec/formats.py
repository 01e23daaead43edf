"""The file formats of outputs: names on the wire, extensions and content types."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

ImageFormat = Literal["jpeg", "png", "webp"]

VideoFormat = Literal["webp", "mp4"]

OutputFormat = Literal[ImageFormat, VideoFormat]

FileFormat = Literal["npy", OutputFormat]
"""Formats of `lora-serve render`: `npy` is raw pixels and sound, the others are encoded."""

FILE_TYPES: Mapping[OutputFormat, tuple[str, str]] = MappingProxyType(
    {
        "jpeg": ("jpg", "image/jpeg"),
        "png": ("png", "image/png"),
        "webp": ("webp", "image/webp"),
        "mp4": ("mp4", "video/mp4"),
    }
)
"""Extension and content type of each format."""
