"""Wan: the control image as first frame, and how the trainer's previews differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessorPil

from deployments.spec.job import PromptSpec


def image_arguments(_pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for the control image, if there is one: stretched to the video's size."""
    size = (prompt.width, prompt.height)
    return {"image": controls[0].resize(size, Image.Resampling.LANCZOS)} if controls else {}


@contextmanager
def rounded_start(pipeline: Any, arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Round the noise and the image condition to the models' dtype if the video starts from an image.

    diffusers keeps both in float32.
    """
    if "image" not in arguments:
        yield
        return
    original = pipeline.prepare_latents

    def rounded(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        latents, condition, *mask = original(*args, **kwargs)
        dtype = pipeline.vae.dtype
        return latents.to(dtype).float(), condition.to(dtype).float(), *mask

    pipeline.prepare_latents = rounded
    try:
        yield
    finally:
        pipeline.prepare_latents = original


@contextmanager
def trainer_boundary(pipeline: Any, arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """As `rounded_start`, and switch to the low-noise transformer where the trainer does."""
    original = pipeline.config.boundary_ratio
    pipeline.register_to_config(boundary_ratio=0.875)
    try:
        with rounded_start(pipeline, arguments):
            yield
    finally:
        pipeline.register_to_config(boundary_ratio=original)


@contextmanager
def trainer_resize(pipeline: Any, _arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Let CLIP see the control image resized as by torchvision, which the trainer has installed."""
    original = pipeline.image_processor
    pipeline.image_processor = BytesProcessor.from_dict(original.to_dict())
    try:
        yield
    finally:
        pipeline.image_processor = original


class BytesProcessor(CLIPImageProcessorPil):
    """CLIP's image processor with torchvision's resize, which is torch's resize of uint8."""

    def resize(self, image: np.ndarray, size: Any, *_: object, **__: object) -> np.ndarray:  # noqa: ANN401
        """Resize an image uint8 [3, H, W] bicubically so that its shorter side is `size.shortest_edge`."""
        _, *sides = image.shape
        target = [int(size.shortest_edge * side / min(sides)) for side in sides]
        pixels = torch.from_numpy(image)[None]
        return functional.interpolate(pixels, target, mode="bicubic", antialias=True)[0].numpy()
