"""What Qwen-Image-Edit's text encoder gets, with the trainer's errors that LoRAs were trained with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from deployments.pipelines.qwen_image import edit_arguments, edit_plus_arguments, edit_plus_preview_arguments
from tests.support.studio import Studio

MEAN, STD = (torch.tensor(values) for values in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
"""CLIP's constants, by channel."""


class Recorder:
    """Wraps the pipeline's processor and records its inputs."""

    def __init__(self, processor: Callable[..., dict[str, torch.Tensor]]) -> None:
        self._processor = processor
        self.images: list[torch.Tensor] = []
        self.sizes: list[tuple[int, ...]] = []
        self.made: dict[str, torch.Tensor] = {}

    def __call__(
        self, text: list[str], images: torch.Tensor | list[torch.Tensor], **options: object
    ) -> object:
        self.images = images if isinstance(images, list) else [images]
        self.sizes += [tuple(image.shape[2:]) for image in self.images]
        self.made = self._processor(text, images, **options)
        return self.made


def shown(used: Studio, arguments: Callable[..., object], controls: list[Image.Image]) -> Recorder:
    """Return what the text encoder gets for these control images."""
    pipeline = used.engine._pipeline
    recorder = Recorder(pipeline.processor)
    pipeline.processor = recorder
    try:
        with torch.inference_mode():
            arguments(pipeline, used.prompt(), controls)
    finally:
        pipeline.processor = recorder._processor
    return recorder


def test_a_landscape_is_shown_as_a_portrait_of_a_megapixel(studio: Callable[[str], Studio]) -> None:
    image = Image.radial_gradient("L").convert("RGB").resize((96, 64))
    recorder = shown(studio("qwen_image_edit"), edit_arguments, [image])
    assert [tuple(seen.shape) for seen in recorder.images] == [(1, 3, 1248, 832)]
    # 45 x 30 squares of 2 x 2 patches; each square has sides of 28 pixels.
    assert recorder.made["image_grid_thw"].tolist() == [[1, 90, 60]]


def test_each_image_of_edit_plus_is_shown_small_and_has_its_placeholders(
    studio: Callable[[str], Studio],
) -> None:
    used = studio("qwen_image_edit_plus")
    images = [Image.new("RGB", size, "white") for size in ((96, 64), (64, 64))]
    recorder = shown(used, edit_plus_arguments, images)
    assert [tuple(seen.shape) for seen in recorder.images] == [(1, 3, 480, 320), (1, 3, 384, 384)]
    grids = recorder.made["image_grid_thw"]
    placeholder = used.engine._pipeline.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (recorder.made["input_ids"] == placeholder).sum() == grids.prod(1).sum() // 4
    assert recorder.made["pixel_values"].shape == (grids.prod(1).sum(), 3 * 2 * 14 * 14)


def test_pictures_are_shown_divided_by_255_twice(studio: Callable[[str], Studio]) -> None:
    color = (255, 128, 0)
    recorder = shown(studio("qwen_image_edit"), edit_arguments, [Image.new("RGB", (64, 64), color)])
    pixels = recorder.made["pixel_values"].unflatten(1, (3, -1)).mean((0, 2))
    expected = (torch.tensor(color) / 255 / 255 - MEAN) / STD
    assert np.allclose(pixels, expected, atol=1e-3)


def test_previews_show_images_in_their_own_aspect_and_smaller_to_the_negative_prompt(
    studio: Callable[[str], Studio],
) -> None:
    used = studio("qwen_image_edit_plus")
    image = Image.new("RGB", (100, 40), "white")
    recorder = shown(used, edit_plus_preview_arguments, [image])
    assert recorder.sizes == [(256, 608), (256, 576)]
