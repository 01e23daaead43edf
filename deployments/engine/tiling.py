"""Decodes in overlapping tiles, which takes less memory and blends the tiles where they meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def tiled_decode(vae: Any) -> Iterator[None]:  # noqa: ANN401 - any diffusers VAE
    """Make `vae` decode pictures larger than its tile size in tiles. It still encodes without tiles."""
    original = vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        vae.enable_tiling()
        try:
            return original(*args, **kwargs)
        finally:
            vae.disable_tiling()

    vae.decode = decode
    try:
        yield
    finally:
        vae.decode = original
