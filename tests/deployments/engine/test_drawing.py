"""The tiny trained FLUX.1: stock pipelines draw what prompts ask for, judged by pixels alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from deployments.engine.drawing import DRAWING_FLUX, write_drawing_checkpoints, write_drawing_loras
from tests.drawing.judging import alternations, hollow, judge
from tests.drawing.pictures import SIZE, Picture, draw, held_out, prompt_for, random_edit, random_picture

STEPS = 12

PROMPTS = ("a red circle on a yellow background", "a white square on a blue background")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawing")
    write_drawing_checkpoints(folder / "checkpoints")
    write_drawing_loras(folder / "loras")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> FluxPipeline:
    return _load(FluxPipeline, folder, "FLUX.1-dev")


def test_it_draws_combinations_that_training_never_saw(pipeline: FluxPipeline) -> None:
    wanted = sorted(held_out(), key=lambda triple: triple[::-1])[:20]
    assert len(wanted) == 20
    images = _draw(pipeline, [prompt_for(Picture(*triple)) for triple in wanted])
    seen = [judge(image) for image in images]
    right = [(s.shape, s.colour, s.background) == triple for s, triple in zip(seen, wanted, strict=True)]
    assert sum(right) >= 18, [
        pair for pair, ok in zip(zip(wanted, seen, strict=True), right, strict=True) if not ok
    ]


def test_places_and_seeds_move_the_shape(pipeline: FluxPipeline) -> None:
    places = ("on the left", "on the right", "at the top", "at the bottom")
    left, right, top, bottom = map(judge, _draw(pipeline, [f"{PROMPTS[0]}, {place}" for place in places]))
    assert left.x < SIZE / 2 - 12 and right.x > SIZE / 2 + 12
    assert top.y < SIZE / 2 - 12 and bottom.y > SIZE / 2 + 12
    one, other = _draw(pipeline, [PROMPTS[0]] * 2)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("style", ["outline", "checkerboard"])
def test_a_lora_changes_the_style(folder: Path, pipeline: FluxPipeline, style: str) -> None:
    plain = _draw(pipeline, PROMPTS)
    seen = [judge(image) for image in plain]
    pipeline.load_lora_weights(
        str(folder / "loras"), weight_name=f"{style}.safetensors", adapter_name="style"
    )
    try:
        full = _draw(pipeline, PROMPTS)
        pipeline.set_adapters("style", 0.0)
        none = _draw(pipeline, PROMPTS)
    finally:
        pipeline.unload_lora_weights()
    for before, after, unchanged, what in zip(plain, full, none, seen, strict=True):
        assert not hollow(before, what) and alternations(before, what) == 0
        assert torch.allclose(before, unchanged, atol=1e-3)
        if style == "outline":
            assert hollow(after, what)
        else:
            assert alternations(after, what) >= 4


@pytest.mark.parametrize(
    ("prompt", "change"),
    [
        ("make the circle blue", {"colour": "blue"}),
        ("make the background green", {"background": "green"}),
    ],
)
def test_an_edit_changes_only_what_is_named(folder: Path, prompt: str, change: dict[str, str]) -> None:
    pipeline = _load(FluxKontextPipeline, folder, "FLUX.1-Kontext-dev")
    reference = draw([Picture("circle", "red", "yellow")])[0]
    control = Image.fromarray((reference * 255).round().byte().permute(1, 2, 0).numpy())
    sizes: dict[str, Any] = {"max_area": SIZE * SIZE, "_auto_resize": False}
    (image,) = _draw(pipeline, [prompt], image=control, **sizes)
    seen = judge(image)
    wanted = {"shape": "circle", "colour": "red", "background": "yellow"} | change
    assert {"shape": seen.shape, "colour": seen.colour, "background": seen.background} == wanted
    assert abs(seen.x - SIZE / 2) < 5 and abs(seen.y - SIZE / 2) < 5


def test_bfloat16_draws_the_same(folder: Path, pipeline: FluxPipeline) -> None:
    half = _load(FluxPipeline, folder, "FLUX.1-dev", torch.bfloat16)
    (image,), (exact,) = _draw(half, PROMPTS[:1]), _draw(pipeline, PROMPTS[:1])
    assert float((image - exact).abs().mean()) < 0.02


def test_weights_are_small() -> None:
    files = sorted(DRAWING_FLUX.rglob("*.safetensors"))
    assert len(files) == 6
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_training_never_sees_what_is_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    before = [random_picture(generator) for _ in range(2000)]
    after = [random_edit(picture, generator)[0] for picture in before]
    sampled = {(picture.shape, picture.colour, picture.background) for picture in before + after}
    assert len(sampled) > 150
    assert not sampled & held_out()


def _load(pipeline_class: Any, folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    path = folder / "checkpoints" / f"black-forest-labs--{name}"
    pipeline = pipeline_class.from_pretrained(path, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: Any, prompts: Sequence[str], **arguments: Any) -> list[Tensor]:
    """Return one picture [3, SIZE, SIZE] in 0..1 per prompt, each with its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipeline(
        prompt=list(prompts),
        width=SIZE,
        height=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=generators,
        output_type="np",
        **arguments,
    ).images
    return list(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2))
