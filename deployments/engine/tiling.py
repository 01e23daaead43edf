"""Decoding in overlapping tiles, which takes less memory and blends where tiles meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def tiled_decode(vae: Any) -> Iterator[None]:  # noqa: ANN401 - any diffusers VAE
    """Let `vae` decode in tiles of its own size what is larger than one, and encode whole as ever."""
    whole = vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        vae.enable_tiling()
        try:
            return whole(*args, **kwargs)
        finally:
            vae.disable_tiling()

    vae.decode = decode
    try:
        yield
    finally:
        vae.decode = whole
