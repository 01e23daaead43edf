"""Z-Image: how the trainer's previews count guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deployments.spec.job import PromptSpec


def preview_arguments(_pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for guidance: no guidance is 0 in the pipeline and 1 in the trainer."""
    return {"guidance_scale": max(0.0, prompt.guidance - 1)}
