"""FLUX.2: the trainer's schedule and klein's negative prompt, which diffusers lacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from deployments.spec.job import PromptSpec


def complete_tokenizer(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Give the tokenizer its chat template if it is stored in a file that only a processor would read."""
    tokenizer = pipeline.tokenizer
    if tokenizer.chat_template is None:
        file = Path(tokenizer.name_or_path) / "chat_template.json"
        tokenizer.chat_template = json.loads(file.read_text())["chat_template"]


def round_references(pipeline: Any) -> None:  # noqa: ANN401
    """Round control image tokens to bfloat16, whatever the dtype, as trainer and reference do."""
    original = pipeline.prepare_image_latents

    def rounded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        latents, ids = original(*args, **kwargs)
        return latents.bfloat16().to(latents.dtype), ids

    pipeline.prepare_image_latents = rounded


def adjust_dev(pipeline: Any) -> None:  # noqa: ANN401
    """Adjust FLUX.2 [dev] to the trainer: chat template and rounded references."""
    complete_tokenizer(pipeline)
    round_references(pipeline)


def klein_arguments(pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for klein: as for [dev] and, with guidance above 1, the negative prompt."""
    arguments = dev_arguments(pipeline, prompt, controls)
    if prompt.guidance > 1:
        arguments["negative_prompt_embeds"] = pipeline.encode_prompt(prompt.neg)[0]
    return arguments


def dev_arguments(_pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for FLUX.2 [dev]: the trainer's schedule, with the control images as references."""
    return {"sigmas": _sigmas(prompt), "image": list(controls) or None}


def _sigmas(prompt: PromptSpec) -> list[float]:
    """Return FLUX.1's schedule, shifted by the token count. diffusers' shift also depends on the steps."""
    tokens = (prompt.width // 16) * (prompt.height // 16)
    shift = np.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    times = np.linspace(1, 0, prompt.steps + 1)[:-1]
    return (shift / (shift + 1 / times - 1)).tolist()
