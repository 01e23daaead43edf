"""Qwen-Image editing: turns prompt and control images into embeddings, as the trainer's LoRAs learnt them.

The text encoder reads the prompt with the control images in it. The transformer also reads the images, as
latents of about one megapixel, which diffusers makes. The text path differs from diffusers in two ways. They
look like errors but must stay:

1. The pictures reach the processor as 0..1 and are divided by 255 again, so the vision tower sees almost
   black.
2. Their sides are computed from height over width where width over height is meant, so a landscape is
   squeezed into a portrait. Only the reference server does this; the trainer does not. Almost black pictures
   differ little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from deployments.spec.job import PromptSpec, without

_IMAGE = "<|image_pad|>"

_MEGAPIXEL = 1024 * 1024
_SMALL = 384 * 384
"""Areas in pixels at which the text encoder sees a control image: megapixel for Edit, small for Edit Plus."""


class ImageProcessor(Qwen2VLImageProcessorPil):
    """Resizes as torchvision would. Pillow would round to 1/255 before the second division by 255."""

    def resize(self, image: np.ndarray, size: Any, resample: object, factor: int, **_: object) -> np.ndarray:  # noqa: ANN401
        """Resize an image [3, H, W] bicubically, unclamped, to sides that are multiples of `factor`."""
        _, height, width = image.shape
        sides = smart_resize(height, width, factor, size.shortest_edge, size.longest_edge)
        pixels = torch.from_numpy(image)[None]
        return functional.interpolate(pixels, size=sides, mode="bicubic", antialias=True)[0].numpy()


class Processor:
    """The part of Qwen2.5-VL's processor that the pipelines use. The library's one needs torchvision."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - the library's tokenizers share no typed base
        self._tokenizer = tokenizer
        self._images = ImageProcessor(min_pixels=56 * 56, max_pixels=12_845_056)

    def __call__(self, text: list[str], images: Any, **options: Any) -> BatchFeature:  # noqa: ANN401
        """Return token ids, with one placeholder per 2 x 2 patches of each image, and the patches' pixels."""
        seen = self._images(images, return_tensors="pt")
        for grid in seen["image_grid_thw"]:
            text = [one.replace(_IMAGE, "\0" * (grid.prod().item() // 4), 1) for one in text]
        tokens = self._tokenizer([one.replace("\0", _IMAGE) for one in text], **options)
        return BatchFeature({**tokens, **seen})


def use_own_processor(pipeline: Any) -> None:  # noqa: ANN401 - any Qwen-Image pipeline
    """Install `Processor`; the row loads the pipeline without a processor."""
    pipeline.processor = Processor(pipeline.tokenizer)


def edit_arguments(pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for Qwen-Image-Edit: one control image, stretched to the output's aspect for the latents."""
    image = controls[0].resize((prompt.width, prompt.height), Image.Resampling.LANCZOS)
    seen = _shrink_swapped(_pixels(controls[0]), _MEGAPIXEL)
    return {"image": image, **_embeddings(pipeline, prompt, seen, seen)}


def edit_preview_arguments(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    controls: Sequence[Image.Image],
) -> dict[str, Any]:
    """As `edit_arguments`, for a preview of the trainer."""
    image = controls[0].resize((prompt.width, prompt.height), Image.Resampling.BILINEAR)
    seen = _shrink(_pixels(controls[0]), _MEGAPIXEL)
    return {"image": image, **_embeddings(pipeline, prompt, seen, seen)}


def edit_plus_arguments(pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for Qwen-Image-Edit-2509 and -2511: control images keep their aspect."""
    seen = [_shrink_swapped(_pixels(control), _SMALL) for control in controls]
    return {"image": list(controls), **_embeddings(pipeline, prompt, seen, seen)}


def edit_plus_preview_arguments(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    controls: Sequence[Image.Image],
) -> dict[str, Any]:
    """As `edit_plus_arguments`, for a preview of the trainer.

    The images for the negative prompt are resized a second time, which mostly changes nothing.
    """
    drawn = [*controls[:1], *controls[2:]] if prompt.second_is_shown_only else list(controls)
    seen = [_shrink(_pixels(control), _SMALL) for control in controls]
    seen_twice = [_shrink(pixels, _SMALL) for pixels in seen]
    return {"image": drawn, **_embeddings(pipeline, prompt, seen, seen_twice)}


@contextmanager
def without_rescale(pipeline: Any, arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Apply guidance here, because diffusers would rescale each token to its norm without guidance."""
    guidance, transformer = arguments["true_cfg_scale"], pipeline.transformer
    negative_text = {
        "encoder_hidden_states": arguments.pop("negative_prompt_embeds"),
        "encoder_hidden_states_mask": arguments.pop("negative_prompt_embeds_mask"),
    }
    original = transformer.forward

    def guided(**inputs: Any) -> tuple[Tensor]:  # noqa: ANN401
        (positive,), (negative,) = original(**inputs), original(**{**inputs, **negative_text})
        return (negative + guidance * (positive - negative),)

    arguments["true_cfg_scale"] = 1.0
    if guidance > 1:
        transformer.forward = guided
    try:
        yield
    finally:
        transformer.forward = original


def _embeddings(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    seen: Tensor | list[Tensor],
    seen_by_negative: Tensor | list[Tensor],
) -> dict[str, Any]:
    """Encode both prompts here, because the pipeline would show the text encoder other pictures."""
    arguments: dict[str, Any] = {}
    prompts = (("prompt", prompt.prompt, seen), ("negative_prompt", prompt.neg, seen_by_negative))
    for name, text, pictures in prompts:
        # A placeholder in a user's text would refer to an image that does not exist.
        embeddings, _ = pipeline.encode_prompt(without(text, _IMAGE), image=pictures)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        arguments |= {name: None, f"{name}_embeds": embeddings, f"{name}_embeds_mask": mask}
    return arguments


def _pixels(image: Image.Image) -> Tensor:
    """Return an image as [1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def _shrink(pixels: Tensor, area: int) -> Tensor:
    """Resize [1, 3, H, W] to about `area` with sides that are multiples of 32, as the trainer does."""
    aspect = pixels.shape[-2] / pixels.shape[-1]
    height = math.sqrt(area * aspect)
    return _resize(pixels, height, height / aspect)


def _shrink_swapped(pixels: Tensor, area: int) -> Tensor:
    """As `_shrink` with swapped sides, as in the reference server."""
    aspect = pixels.shape[-2] / pixels.shape[-1]
    return _resize(pixels, math.sqrt(area / aspect), math.sqrt(area * aspect))


def _resize(pixels: Tensor, height: float, width: float) -> Tensor:
    size = (round(height / 32) * 32, round(width / 32) * 32)
    return functional.interpolate(pixels, size=size, mode="bilinear")
