"""Krea 2 with references: attention with and without kept keys and values, sizes, order, text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deployments.catalog import CATALOG
from deployments.pipelines.krea2_edit import (
    Krea2EditTransformer,
    References,
    edit_arguments,
    edit_preview_arguments,
)
from tests.support.studio import Studio

IDS = ("krea2_o_edit", "krea2_o_edit_turbo")

IMAGES = [
    Image.radial_gradient("L").convert("RGB").resize((60, 100)),
    Image.linear_gradient("L").convert("RGB").resize((200, 64)),
    Image.new("RGB", (64, 64), "red"),
]


@pytest.fixture(scope="module")
def used(studio: Callable[[str], Studio]) -> Studio:
    return studio("krea2_o_edit")


@pytest.fixture(scope="module")
def inputs(used: Studio) -> dict[str, Any]:
    """Inputs of one step: 7 tokens of text, 2 x 3 of the image, 2 x 2 of a reference."""
    config = used.engine._pipeline.transformer.config
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image = torch.cartesian_prod(torch.tensor([0]), torch.arange(2), torch.arange(3))
    return {
        "hidden_states": noise(1, 6, config.in_channels),
        "encoder_hidden_states": noise(1, 7, config.num_text_layers, config.text_hidden_dim),
        "timestep": torch.tensor([0.6]),
        "position_ids": torch.cat([torch.zeros(7, 3), image]),
        "references": noise(1, 4, config.in_channels),
    }


POSITIONS = torch.cartesian_prod(torch.tensor([1]), torch.arange(2), torch.arange(2))


def run(model: Krea2EditTransformer, inputs: dict[str, Any], references: References) -> Tensor:
    given = {name: inputs[name] for name in inputs if name != "references"}
    with torch.inference_mode():
        return model(**given, attention_kwargs={"references": references})[0]


def masked(model: Krea2EditTransformer, inputs: dict[str, Any]) -> Tensor:
    """Run one pass with diffusers' own blocks and a mask: references attend to references only."""
    with torch.inference_mode():
        time = model.time_embed(inputs["timestep"], dtype=torch.float32)
        clean = model.time_embed(torch.zeros(1), dtype=torch.float32)
        now, still = (
            model.time_mod_proj(torch.nn.functional.gelu(one, approximate="tanh")) for one in (time, clean)
        )
        text = model.txt_in(model.text_fusion(inputs["encoder_hidden_states"]))
        tokens = model.img_in(torch.cat([inputs["hidden_states"], inputs["references"]], dim=1))
        sequence = torch.cat([text, tokens], dim=1)
        rotary = model.rotary_emb(torch.cat([inputs["position_ids"], POSITIONS]))
        is_reference = torch.arange(17) >= 13
        mask = (~is_reference[:, None] | is_reference[None])[None, None]
        modulation = torch.cat([now.expand(-1, 13, -1), still.expand(-1, 4, -1)], dim=1)
        for block in model.transformer_blocks:
            sequence = block(sequence, modulation, rotary, mask)
        return model.final_layer(sequence[:, 7:13], time)


def test_what_is_kept_of_the_references_changes_no_number(used: Studio, inputs: dict[str, Any]) -> None:
    model = used.engine._pipeline.transformer
    expected = masked(model, inputs)
    references = References(inputs["references"], POSITIONS, {})
    first = run(model, inputs, references)
    assert references.kept is not None
    assert len(references.kept) == len(model.transformer_blocks)
    kept = {block: [tensor.clone() for tensor in pair] for block, pair in references.kept.items()}
    second = run(model, inputs, references)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(first, second)
    for block, pair in references.kept.items():
        assert all(map(torch.equal, pair, kept[block]))


def test_without_it_the_references_see_all_and_nothing_is_kept(used: Studio, inputs: dict[str, Any]) -> None:
    model = used.engine._pipeline.transformer
    open_to_all = run(model, inputs, References(inputs["references"], POSITIONS))
    assert (open_to_all - masked(model, inputs)).abs().max() > 1e-3


def test_nothing_of_a_picture_stays_in_the_transformer(used: Studio) -> None:
    used.picture()
    blocks = used.engine._pipeline.transformer.transformer_blocks
    assert {type(block.attn.processor).__name__ for block in blocks} == {"Krea2AttnProcessor"}


@pytest.mark.parametrize("name", ["kv_cache", "match_target_res"])
def test_each_option_changes_the_picture(used: Studio, name: str) -> None:
    off = used.picture(controls=IMAGES[1:], options={**CATALOG["krea2_o_edit"].options, name: False})
    assert not np.array_equal(off, used.picture(controls=IMAGES[1:]))


@pytest.mark.parametrize(
    ("image", "match", "grid"),
    [
        ((60, 100), True, (6, 4)),  # 102.4 x 61.4
        ((60, 100), False, (6, 4)),  # The reference's own size: it is never enlarged.
        ((88, 120), False, (8, 6)),  # Halves round to even.
        ((1600, 1600), True, (5, 5)),
        ((1600, 1600), False, (64, 64)),  # A megapixel.
        ((640, 10), True, (1, 39)),
    ],
)
def test_the_size_of_a_reference(
    used: Studio, image: tuple[int, int], match: bool, grid: tuple[int, int]
) -> None:
    prompt = used.prompt(options={"kv_cache": True, "match_target_res": match}, guidance=1.0)
    controls = [Image.new("RGB", image)]
    with torch.inference_mode():
        references = edit_arguments(used.engine._pipeline, prompt, controls)["attention_kwargs"]["references"]
    assert references.latents.shape[1] == grid[0] * grid[1]
    assert references.positions[-1].tolist() == [1, grid[0] - 1, grid[1] - 1]


def test_references_come_in_order_each_with_its_own_first_position(used: Studio) -> None:
    pictures = [used.picture(controls=images) for images in (IMAGES, IMAGES[::-1], IMAGES[:2])]
    assert len({picture.tobytes() for picture in pictures}) == 3
    with torch.inference_mode():
        arguments = edit_arguments(used.engine._pipeline, used.prompt(), IMAGES)
    assert arguments["attention_kwargs"]["references"].positions[:, 0].unique().tolist() == [1, 2, 3]


@pytest.mark.parametrize("model", IDS)
def test_guidance_above_one_guides(studio: Callable[[str], Studio], model: str) -> None:
    used = studio(model)
    for guidance, ignored in ((0.0, True), (1.0, True), (3.0, False)):
        one, other = (used.picture(neg=neg, guidance=guidance) for neg in ("a blurry long text", ""))
        assert np.array_equal(one, other) is ignored


def test_the_noise_is_drawn_after_the_references(used: Studio) -> None:
    """Each reference changes the noise, as in the reference server."""
    states = []
    for controls in (IMAGES[:1], IMAGES[:2]):
        with torch.inference_mode():
            arguments = edit_arguments(used.engine._pipeline, used.prompt(guidance=1.0), controls)
        states.append(torch.randn(4, generator=arguments["generator"]).tolist())
    assert states[0] != states[1]
    assert states[0] != torch.randn(4, generator=torch.Generator().manual_seed(5)).tolist()


def test_in_previews_the_second_image_may_be_for_the_text_alone(used: Studio) -> None:
    def arguments(shown_only: bool) -> dict[str, Any]:
        prompt = used.prompt(second_is_shown_only=shown_only, sampling="preview", guidance=1.0)
        with torch.inference_mode():
            return edit_preview_arguments(used.engine._pipeline, prompt, IMAGES)

    two, three = arguments(True), arguments(False)
    positions = [one["attention_kwargs"]["references"].positions[:, 0] for one in (two, three)]
    assert [one.unique().tolist() for one in positions] == [[1, 2], [1, 2, 3]]
    assert torch.equal(two["prompt_embeds"], three["prompt_embeds"])
    # The engine's own generator draws the noise, which is the first draw of the seed.
    assert "generator" not in two


def test_prompts_are_read_to_their_end(used: Studio) -> None:
    """Text-to-image prompts, by contrast, are cut after 512 tokens."""
    long = "a " * 600
    one, other = (used.picture(prompt=long + end, guidance=1.0) for end in ("cat", "dog in the snow"))
    assert not np.array_equal(one, other)


def test_a_placeholder_in_a_prompt_asks_for_no_image(used: Studio) -> None:
    assert np.array_equal(
        used.picture(prompt="a <|image_<|image_pad|>pad|>cat"), used.picture(prompt="a cat")
    )


def test_the_shift_of_turbo_follows_the_size(studio: Callable[[str], Studio]) -> None:
    """The repository's config pins the shift; the reference and the trainer ignore that."""
    used, drawn = studio("krea2_o_edit_turbo"), []
    for width in (64, 128):
        used.picture(width=width)
        drawn.append(used.engine._pipeline.scheduler.sigmas.tolist())
    assert drawn[0] != drawn[1]
