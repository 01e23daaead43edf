"""FLUX.1 Kontext and Flex.2: what differs from a plain diffusers call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from deployments.spec.job import PromptSpec


def edit_arguments(_pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for FLUX.1 Kontext: the control image stretched to the output size, as in training.

    If a preview's size is not a multiple of 16, diffusers resizes the image once more. `max_area` and
    `_auto_resize` keep diffusers from scaling the output to one megapixel and the image to preferred sizes.
    """
    width, height = prompt.width // 16 * 16, prompt.height // 16 * 16
    return {
        "image": controls[0].resize((prompt.width, prompt.height), Image.Resampling.BILINEAR),
        "width": width,
        "height": height,
        "max_area": width * height,
        "_auto_resize": False,
    }


def feed_flex2(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Let FLUX.1's pipeline drive Flex.2, which has 132 more input channels, without inpainting or control.

    The pipeline derives its latents from the configured `in_channels`. The transformer still has 196 inputs.
    """
    pipeline.transformer.register_to_config(in_channels=64)
    pipeline.transformer.register_forward_pre_hook(_append_empty_channels, with_kwargs=True)


def _append_empty_channels(
    _transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Append to the latents [batch, tokens, 64]: inpaint latents (64), mask (4), control latents (64)."""
    latents = kwargs["hidden_states"]
    empty = torch.zeros_like(latents)
    # Ones in the mask: paint everything.
    extended = torch.cat([latents, empty, torch.ones_like(latents[..., :4]), empty], dim=-1)
    return args, {**kwargs, "hidden_states": extended}
