"""Krea 2: guidance, prompt length and precision, where diffusers differs from trainer and reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deployments.engine.tiling import tiled_decode
from deployments.spec.job import PromptSpec

_TEXT_TOKENS = 512 + 5
"""512 tokens of the prompt plus the five that follow it, which diffusers counts too."""


def keep_state_in_float32(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Cast to the model's dtype only inside the transformer; else each step would round noise and latents."""
    pipeline.transformer.register_forward_pre_hook(_narrow, with_kwargs=True)
    pipeline.transformer.register_forward_hook(_widen)


def text_arguments(pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for the prompts and for guidance."""
    return guided_arguments(
        prompt, lambda text: pipeline.encode_prompt(text, max_sequence_length=_TEXT_TOKENS)
    )


def guided_arguments(prompt: PromptSpec, encode: Callable[[str], tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Arguments for guidance and for the prompts that it needs, encoded by `encode` to embeddings and masks.

    For this model diffusers counts guidance from 0, so 1 in a request means no guidance. The pipeline's
    latents take the embeddings' dtype, hence float32.
    """
    guidance = max(0.0, prompt.guidance - 1)
    texts = {"prompt": prompt.prompt} | ({"negative_prompt": prompt.neg} if guidance else {})
    arguments: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": None}
    for name, text in texts.items():
        embeds, mask = encode(text)
        arguments |= {name: None, f"{name}_embeds": embeds.float(), f"{name}_embeds_mask": mask}
    return arguments


def trainer_tiles(pipeline: Any, _arguments: dict[str, Any]) -> AbstractContextManager[None]:  # noqa: ANN401
    """Decode in tiles of 256 pixels, 192 apart."""
    return tiled_decode(pipeline.vae)


def _narrow(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    return args, {**kwargs, **{name: kwargs[name].to(transformer.dtype) for name in names}}


def _widen(_transformer: torch.nn.Module, _args: object, output: tuple[Tensor]) -> tuple[Tensor]:
    return (output[0].float(),)
