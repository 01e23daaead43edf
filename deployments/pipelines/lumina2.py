"""Lumina-Image 2.0: how the trainer's previews encode the negative prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from deployments.spec.job import PromptSpec

_TEXT_TOKENS = 256


def preview_arguments(pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for both prompts, each with the system prompt in front, the negative one too."""
    arguments: dict[str, Any] = {}
    for name, text in (("prompt", prompt.prompt), ("negative_prompt", prompt.neg)):
        embeds, mask, *_ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=_TEXT_TOKENS
        )
        arguments |= {name: None, f"{name}_embeds": embeds, f"{name}_attention_mask": mask}
    return arguments
