"""FLUX.1: what differs from a plain diffusers call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deployments.render import PromptSpec


def edit_arguments(_pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for FLUX.1 Kontext: the control image stretched to the output size, as it was trained.

    Without the last two diffusers would scale the output to one megapixel and the image to sizes of its own.
    """
    size = (prompt.width, prompt.height)
    return {
        "image": controls[0].resize(size, Image.Resampling.BILINEAR),
        "max_area": prompt.width * prompt.height,
        "_auto_resize": False,
    }
