"""Stable Diffusion XL: the flags in prompts that the trainer's previews obey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deployments.spec.job import PromptSpec


def flag_arguments(_pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for guidance rescale, and the second text encoder's own negative prompt."""
    arguments: dict[str, Any] = {"guidance_rescale": prompt.guidance_rescale}
    if prompt.neg_2 is not None:
        # The pipeline replaces an empty one by the first negative prompt. A blank encodes like no text.
        arguments["negative_prompt_2"] = prompt.neg_2 or " "
    return arguments
