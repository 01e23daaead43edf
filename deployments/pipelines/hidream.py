"""HiDream-I1 and E1: their sampling schedule and the padding of their fourth text encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image

from deployments.spec.job import PromptSpec

_FIRST_SIGMA = np.float32(3 * 0.999 / (1 + 2 * 0.999))
"""The first sigma: 0.999, the noisiest of a thousand training steps, after a shift of 3."""

_SHIFT = math.exp(1.15)
"""I1's second shift: that of FLUX.1's schedule at 4096 tokens, one megapixel."""

_EDIT_SHIFT = 3.0
"""E1's second shift, equal to the first."""


class TwiceShifted(UniPCMultistepScheduler):
    """Flow UniPC over evenly spaced sigmas that start at the shifted first sigma and are shifted again."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,  # type: ignore[override]
        sigmas: list[float] | None = None,
        mu: bool | None = None,
    ) -> None:
        """Set `num_inference_steps` even steps. The pipeline passes no `sigmas`."""
        if num_inference_steps is None:
            raise ValueError("num_inference_steps is missing")
        even = np.linspace(_FIRST_SIGMA, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(device=device, sigmas=even)  # type: ignore[arg-type]


def complete(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Replace the repository's scheduler; set Llama's padding token as the pipeline's constructor would."""
    _complete(pipeline, _SHIFT)


def complete_edit(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """As `complete`, for HiDream-E1."""
    _complete(pipeline, _EDIT_SHIFT)


def edit_arguments(_pipeline: Any, _prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for HiDream-E1: the control image."""
    return {"image": controls[0]}


def _complete(pipeline: Any, shift: float) -> None:  # noqa: ANN401
    pipeline.scheduler = TwiceShifted(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    pipeline.tokenizer_4.pad_token = pipeline.tokenizer_4.eos_token


@contextmanager
def rounded_frequencies(pipeline: Any, _arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Round Llama's rotary frequencies to its dtype, as the trainer does. No change in float32."""
    rotary, dtype = pipeline.text_encoder_4.model.rotary_emb, pipeline.text_encoder_4.dtype
    original = rotary.inv_freq
    rotary.inv_freq = original.to(dtype).float()
    try:
        yield
    finally:
        rotary.inv_freq = original
