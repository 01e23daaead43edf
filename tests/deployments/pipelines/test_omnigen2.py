"""OmniGen2: names and shapes of the real checkpoint, texts, references, sizes, LoRAs and merged weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from deployments.pipelines.omnigen2_transformer import OmniGen2Transformer2DModel
from tests.parity.cases import FOLDER
from tests.support.studio import Studio

BUNDLE = FOLDER / "omnigen2"

SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."

IMAGES = [
    Image.radial_gradient("L").convert("RGB").resize((60, 100)),
    Image.linear_gradient("L").convert("RGB").resize((200, 64)),
    Image.new("RGB", (64, 64), "red"),
]


@pytest.fixture(scope="module")
def used(studio: Callable[[str], Studio]) -> Studio:
    return studio("omnigen2")


def shapes(**config: object) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = OmniGen2Transformer2DModel(**config)  # type: ignore[arg-type] - from JSON
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_and_shapes_are_those_of_the_checkpoint() -> None:
    config = json.loads((BUNDLE / "checkpoint" / "transformer" / "config.json").read_text())
    expected = json.loads((BUNDLE / "parameters.json").read_text())
    assert shapes(**{name: config[name] for name in config if name[0] != "_"}) == expected


def test_the_defaults_are_the_published_model() -> None:
    assert sum(map(math.prod, shapes().values())) == pytest.approx(3.967e9, abs=5e5)


def test_nothing_is_saved_beside_the_parameters() -> None:
    with torch.device("meta"):
        model = OmniGen2Transformer2DModel(num_layers=1, num_refiner_layers=1)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_positions_go_on_after_each_reference(used: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    rotary = OmniGen2Transformer2DModel._rotary

    def watch(model: OmniGen2Transformer2DModel, positions: Tensor) -> Tensor:
        seen.append(positions)
        return rotary(model, positions)

    monkeypatch.setattr(OmniGen2Transformer2DModel, "_rotary", watch)
    used.picture(width=96, height=64, steps=1, guidance=1.0, controls=[IMAGES[1], IMAGES[2]])
    text, wide, square, image = seen
    length = len(text)
    assert text.tolist() == [[k, k, k] for k in range(length)]
    # 192 x 64, 64 x 64 and 96 x 64 pixels in patches of 16.
    assert wide[[0, -1]].tolist() == [[length, 0, 0], [length, 3, 11]]
    assert square[[0, -1]].tolist() == [[length + 12, 0, 0], [length + 12, 3, 3]]
    assert image[[0, 1, -1]].tolist() == [[length + 16, 0, 0], [length + 16, 0, 1], [length + 16, 3, 5]]


def test_each_axis_turns_its_own_pairs(used: Studio) -> None:
    model = used.engine._pipeline.transformer
    turns = model._rotary(torch.tensor([[3, 5, 7]]))
    expected = [position * 10000 ** (-2 * j / 4) for position in (3, 5, 7) for j in (0, 1)]
    assert turns.shape == (1, 1, 6)
    assert torch.view_as_real(turns)[0, 0, :, 0].tolist() == pytest.approx(np.cos(expected).tolist())
    assert torch.view_as_real(turns)[0, 0, :, 1].tolist() == pytest.approx(np.sin(expected).tolist())


def test_texts_are_put_in_the_template_twice_but_an_empty_negative_one_once(
    used: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def template(text: str) -> str:
        return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"

    pipeline, texts = used.engine._pipeline, []
    tokenizer = pipeline.tokenizer

    def watch(text: str, **options: Any) -> object:
        texts.append(text)
        return tokenizer(text, **options)

    monkeypatch.setattr(pipeline, "tokenizer", watch)
    for neg, sampling in (("", "reference"), ("dull", "reference"), ("", "preview")):
        used.picture(prompt="a cat", neg=neg, sampling=sampling, steps=1)
    cat, empty, dull = template(template("a cat")), template(""), template(template("dull"))
    assert texts == [cat, empty, cat, dull, cat, template(empty)]


def test_a_text_is_read_from_left_to_right_and_to_its_256th_token(used: Studio) -> None:
    one, other = (used.engine._pipeline._read(text) for text in ("a cat", "two dogs in the snow"))
    same = len(used.engine._pipeline.tokenizer(f"<|im_start|>system\n{SYSTEM}").input_ids)
    torch.testing.assert_close(one[:, :same], other[:, :same])
    assert used.engine._pipeline._read("a " * 400).shape[1] == 256


def test_references_come_in_order_and_leave_the_size_alone(used: Studio) -> None:
    choices = [[], IMAGES[:1], IMAGES[:2], IMAGES, IMAGES[::-1]]
    pictures = [used.picture(controls=images) for images in choices]
    assert {picture.shape for picture in pictures} == {(64, 96, 3)}
    assert len({picture.tobytes() for picture in pictures}) == len(choices)


def test_the_negative_prompt_sees_the_references_too(used: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    forward = OmniGen2Transformer2DModel.forward

    def watch(model: OmniGen2Transformer2DModel, image: Tensor, *inputs: object) -> Tensor:
        counts.append(len(inputs[2]))  # type: ignore[arg-type]
        return forward(model, image, *inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(OmniGen2Transformer2DModel, "forward", watch)
    used.picture(steps=1, controls=IMAGES[:2])
    assert counts == [2, 2]


def test_references_leave_the_noise_alone(used: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """References use their own generator with the same seed."""
    first = []
    forward = OmniGen2Transformer2DModel.forward

    def watch(model: OmniGen2Transformer2DModel, image: Tensor, *inputs: object) -> Tensor:
        first.append(image)
        return forward(model, image, *inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(OmniGen2Transformer2DModel, "forward", watch)
    for controls in ([], IMAGES):
        used.picture(steps=1, guidance=1.0, controls=controls, seed=3)
    expected = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(latents, expected) for latents in first)


@pytest.mark.parametrize(
    ("image", "latents"),
    [
        ((60, 100), (12, 6)),  # Floored to 48 x 96, never enlarged.
        ((16, 16), (2, 2)),
        ((1008, 16), (2, 126)),
        ((2048, 64), (4, 128)),  # Its longer side becomes 1024.
    ],
)
def test_the_size_of_a_reference(used: Studio, image: tuple[int, int], latents: tuple[int, int]) -> None:
    with torch.inference_mode():
        encoded = used.engine._pipeline._encode(Image.new("RGB", image), torch.Generator().manual_seed(0))
    assert encoded.shape == (1, 16, *latents)


def test_the_longest_shape_that_is_taken_leaves_a_reference(used: Studio) -> None:
    taken = used.engine.spec.control_images
    assert taken.take((16, 1008))
    assert not taken.take((15, 64))
    assert not taken.take((16, 1024))
    for short in (16, 17, 100, 1023):
        for size in ((short, short * 63), (short * 63, short)):
            assert taken.take(size)
            scale = min(math.sqrt(1024**2 / math.prod(size)), 1024 / max(size), 1)
            assert min(int(side * scale) for side in size) >= 16


def test_a_preview_stretches_its_reference_and_has_sizes_of_8(used: Studio) -> None:
    picture = used.picture(width=152, height=120, sampling="preview", controls=IMAGES[:1])
    assert picture.shape == (120, 152, 3)
    stretched = IMAGES[0].resize((152, 120), Image.Resampling.BILINEAR)
    again = used.picture(width=152, height=120, sampling="preview", controls=[stretched])
    assert np.array_equal(picture, again)


@pytest.mark.slow
def test_above_a_megapixel_it_draws_smaller(used: Studio) -> None:
    picture = used.picture(width=2048, height=528, steps=1, guidance=1.0)
    assert picture.shape == (528, 2048, 3)
    assert used.engine._pipeline.scheduler.shift == pytest.approx(math.sqrt(64 * 252) / 40)


def test_the_times(used: Studio) -> None:
    """t = i/N, then t / (m - m t + t) with m = sqrt(latent pixels) / 40."""
    used.picture(width=128, height=96, steps=3, guidance=1.0)
    m = math.sqrt(16 * 12) / 40
    expected = [t / (m - m * t + t) for t in (0, 1 / 3, 2 / 3, 1)]
    assert (1 - used.engine._pipeline.scheduler.sigmas).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("file", ["style_a.safetensors", "style_b.safetensors"])
@pytest.mark.parametrize("sampling", ["reference", "preview"])
def test_an_adapter_equals_merged_weights(
    used: Studio, new_studio: Callable[[str], Studio], file: str, sampling: str
) -> None:
    """The reference multiplies all three in the file's dtype, the trainer in float32. B is in bfloat16."""
    fields: dict[str, Any] = {"neg": "dull", "sampling": sampling, "width": 128, "height": 96}
    ours = used.render({file: 1.5}, **fields)
    merged = new_studio("omnigen2")
    weights = dict(merged.engine._pipeline.transformer.named_parameters())
    tensors = load_file(BUNDLE / "lora" / file)
    dtype = (
        torch.float32
        if sampling == "preview"
        else tensors["diffusion_model.layers.0.attn.to_q.lora_A.weight"].dtype
    )
    for name in [name for name in tensors if ".lora_A." in name]:
        delta = tensors[name.replace(".lora_A.", ".lora_B.")].to(dtype) @ tensors[name].to(dtype)
        path = name.removeprefix("diffusion_model.").replace(".lora_A.weight", ".weight")
        weights[path].data += (1.5 * delta).float()
    difference = np.abs(ours.astype(int) - merged.picture(**fields).astype(int))
    assert (difference.max() <= 1, difference.mean() <= 0.005) == (True, True)
