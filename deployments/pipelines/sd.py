"""Stable Diffusion XL: what flags in the prompts of the trainer's previews say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deployments.spec.job import PromptSpec


def flag_arguments(_pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for guidance rescale, and the second text encoder's own negative prompt."""
    arguments: dict[str, Any] = {"guidance_rescale": prompt.guidance_rescale}
    if prompt.neg_2 is not None:
        # An empty one would mean that of the first; a blank is as empty to the tokenizer.
        arguments["negative_prompt_2"] = prompt.neg_2 or " "
    return arguments
