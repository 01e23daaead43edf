"""Krea 2: guidance, prompt length and precision, where diffusers differs from trainer and reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deployments.render import PromptSpec

_TEXT_TOKENS = 512 + 5
"""512 of the prompt; diffusers counts the five that follow it too."""


def keep_state_in_float32(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Let the transformer alone see its own dtype; noise and latents would be rounded to it at each step."""
    pipeline.transformer.register_forward_pre_hook(_narrow, with_kwargs=True)
    pipeline.transformer.register_forward_hook(_widen)


def text_arguments(pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for the prompts, whose dtype the pipeline takes for its latents, and for guidance.

    Diffusers counts guidance from 0 for this model: 1 in a request guides by nothing.
    """
    guidance = max(0.0, prompt.guidance - 1)
    texts = {"prompt": prompt.prompt} | ({"negative_prompt": prompt.neg} if guidance else {})
    arguments: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": None}
    for name, text in texts.items():
        embeds, mask = pipeline.encode_prompt(text, max_sequence_length=_TEXT_TOKENS)
        arguments |= {name: None, f"{name}_embeds": embeds.float(), f"{name}_embeds_mask": mask}
    return arguments


@contextmanager
def tiled_decode(pipeline: Any, _arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Decode in tiles of 256 pixels, 192 apart."""
    pipeline.vae.enable_tiling()
    try:
        yield
    finally:
        pipeline.vae.disable_tiling()


def _narrow(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    return args, {**kwargs, **{name: kwargs[name].to(transformer.dtype) for name in names}}


def _widen(_transformer: torch.nn.Module, _args: object, output: tuple[Tensor]) -> tuple[Tensor]:
    return (output[0].float(),)
