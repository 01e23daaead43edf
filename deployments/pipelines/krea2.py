"""Krea 2: what differs from a plain diffusers call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deployments.render import PromptSpec


def guidance_argument(_pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Guidance as diffusers counts it for this model: from 0, so that 1 in a request guides by nothing."""
    return {"guidance_scale": max(0.0, prompt.guidance - 1)}
