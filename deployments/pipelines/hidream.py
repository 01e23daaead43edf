"""HiDream-I1 and E1: the schedule that they are sampled with, how their fourth text encoder is padded."""

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

_FIRST = np.float32(3 * 0.999 / (1 + 2 * 0.999))
"""Where the sigmas start: 0.999, the noisiest of a thousand training steps, after a shift of 3."""

_SHIFT = math.exp(1.15)
"""I1's second shift, that of FLUX.1's schedule for the 4096 tokens of one megapixel."""

_EDIT_SHIFT = 3.0
"""E1's second shift, the first once more."""


class TwiceShifted(UniPCMultistepScheduler):
    """Flow UniPC over sigmas that fall evenly from the first shift's start, shifted once more."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,  # type: ignore[override]
        sigmas: list[float] | None = None,
        mu: bool | None = None,
    ) -> None:
        """Take `num_inference_steps` even steps; the pipeline gives no sigmas of its own."""
        if num_inference_steps is None:
            raise ValueError("the number of steps is needed")
        even = np.linspace(_FIRST, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(device=device, sigmas=even)  # type: ignore[arg-type]


def complete(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Replace the repository's scheduler, and pad Llama's prompts as the pipeline's constructor would."""
    _complete(pipeline, _SHIFT)


def complete_edit(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Do the same for HiDream-E1."""
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
    """Round Llama's rotary frequencies to its dtype, as the trainer does; nothing to round in float32."""
    rotary, dtype = pipeline.text_encoder_4.model.rotary_emb, pipeline.text_encoder_4.dtype
    own = rotary.inv_freq
    rotary.inv_freq = own.to(dtype).float()
    try:
        yield
    finally:
        rotary.inv_freq = own
