"""Chroma: text encoding and masking as in training, where diffusers differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deployments.spec.job import PromptSpec

_TEXT_TOKENS = 512


def correct_norms(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Set the epsilon of the guidance layer's norms. diffusers uses the dtype's, large in bfloat16."""
    for norm in pipeline.transformer.distilled_guidance_layer.norms:
        norm.eps = 1e-6


def text_arguments(pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for the prompt and, with guidance above 1, an empty negative prompt."""
    return _arguments(pipeline, prompt, neg="", counted_in=torch.long)


def preview_arguments(pipeline: Any, prompt: PromptSpec, _controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """As `text_arguments`, with the negative prompt. The trainer rounds the token count to the dtype."""
    return _arguments(pipeline, prompt, neg=prompt.neg, counted_in=pipeline.text_encoder.dtype)


def _arguments(pipeline: Any, prompt: PromptSpec, neg: str, counted_in: torch.dtype) -> dict[str, Any]:  # noqa: ANN401
    arguments: dict[str, Any] = {"prompt": None}
    for name, text in (("prompt", prompt.prompt), ("negative_prompt", neg))[
        : 2 if prompt.guidance > 1 else 1
    ]:
        embeds, mask = _encode(pipeline, text, counted_in)
        arguments |= {f"{name}_embeds": embeds, f"{name}_attention_mask": mask}
    return arguments


def _encode(pipeline: Any, text: str, counted_in: torch.dtype) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Return T5's embedding [1, 512, width] and the transformer's attention mask [1, 512].

    T5 also sees the padding. The transformer sees the text and one token of padding. The mask is boolean:
    diffusers' mask of zeros and ones is added to the logits, which masks almost nothing.
    """
    tokens = pipeline.tokenizer(
        text, padding="max_length", truncation=True, max_length=_TEXT_TOKENS, return_tensors="pt"
    )
    device = pipeline._execution_device
    embeds = pipeline.text_encoder(tokens.input_ids.to(device))[0]
    mask = tokens.attention_mask.bool()
    end = int(tokens.attention_mask.to(counted_in).sum())
    mask[:, end : end + 1] = True
    return embeds, mask.to(device)
