"""FLUX.1 and Flex: what differs from a plain diffusers call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from deployments.spec.job import PromptSpec


def edit_arguments(_pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for FLUX.1 Kontext: the control image stretched to the output size, as it was trained.

    A preview's size may be no multiple of 16: diffusers then resizes the image once more. Without the last
    two arguments it would scale the output to one megapixel and the image to sizes of its own.
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
    """Make FLUX.1's pipeline drive Flex.2, which sees 132 more channels: nothing kept, nothing to follow.

    The pipeline takes the size of its latents from `in_channels`; the transformer itself keeps its 196.
    """
    pipeline.transformer.register_to_config(in_channels=64)
    pipeline.transformer.register_forward_pre_hook(_widen, with_kwargs=True)


def _widen(
    _transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Append to the latents [batch, tokens, 64]: inpaint latents (64), mask (4), control latents (64)."""
    latents = kwargs["hidden_states"]
    nothing = torch.zeros_like(latents)
    # Ones in the mask: paint everything.
    wide = torch.cat([latents, nothing, torch.ones_like(latents[..., :4]), nothing], dim=-1)
    return args, {**kwargs, "hidden_states": wide}
