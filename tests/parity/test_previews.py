"""Previews and reference pictures alternate on one warm engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from deployments.catalog import CATALOG
from tests.parity.cases import MODELS, each
from tests.parity.test_rules import Interrupted, Interrupting
from tests.support.studio import Studio

pytestmark = pytest.mark.usefixtures("small_canvas")

Get = Callable[[str], Studio]

DIFFERENT = {"lumina2", "sd15", "zimage", "zimage_turbo", "zimage_deturbo"}
DIFFERENT |= {"qwen_image_edit", "qwen_image_edit_plus", "qwen_image_edit_plus_2511"}
DIFFERENT |= {"krea2_o_edit", "krea2_o_edit_turbo", "omnigen2", "hidream_e1"}
DIFFERENT |= {row.id for row in CATALOG.values() if row.video} - {"minimax_h3"}
"""Ids whose previews differ at every size, even without a negative prompt or flags."""


@pytest.mark.parametrize("model", each(model for model in MODELS if model != "flux2_diffusers"))
def test_previews_leave_nothing_behind(studio: Get, model: str) -> None:
    used = studio(model)
    lora = {used.names[0]: 1.0}
    reference = used.render(lora)
    with pytest.raises(Interrupted):
        used.engine.render(used.prompt(steps=2, sampling="preview"), used.controls, Interrupting())
    preview = used.render(lora, sampling="preview")
    assert np.array_equal(reference, preview) is (model not in DIFFERENT)
    assert np.array_equal(reference, used.render(lora))


@pytest.mark.parametrize("model", ["krea2", "krea2_turbo"])
def test_only_previews_are_decoded_in_tiles(studio: Get, model: str) -> None:
    used, tiled = studio(model), []
    vae = used.engine._pipeline.vae
    decode = vae.decode

    def watch(*args: object, **options: object) -> object:
        tiled.append(vae.use_tiling)
        return decode(*args, **options)

    vae.decode = watch
    try:
        for sampling in ("reference", "preview", "reference"):
            used.picture(steps=1, sampling=sampling)
    finally:
        vae.decode = decode
    assert tiled == [False, True, False]


def test_z_image_previews_guide_above_one(studio: Get) -> None:
    used = studio("zimage")
    for guidance, ignored in ((0.0, True), (1.0, True), (1.5, False)):
        one, other = (
            used.render({}, neg=neg, guidance=guidance, sampling="preview") for neg in ("blurry", "")
        )
        assert np.array_equal(one, other) is ignored


def test_chroma_previews_guide_away_from_the_negative_prompt(studio: Get) -> None:
    used = studio("chroma")
    empty, blurry = (used.render({}, neg=neg, sampling="preview") for neg in ("", "blurry"))
    assert np.array_equal(empty, used.render({}))
    assert not np.array_equal(empty, blurry)


def test_the_second_negative_prompt_of_sdxl(studio: Get) -> None:
    used = studio("sdxl")
    pictures = {
        neg_2: used.render({}, neg="blurry", neg_2=neg_2, sampling="preview")
        for neg_2 in (None, "blurry", "", "two cats")
    }
    assert np.array_equal(pictures[None], pictures["blurry"])
    assert len({picture.tobytes() for picture in pictures.values()}) == 3
    rescaled = used.render({}, neg="blurry", guidance_rescale=0.7, sampling="preview")
    assert not np.array_equal(rescaled, pictures[None])


def test_kontext_resizes_a_preview_s_image_twice(studio: Get) -> None:
    used = studio("flux_kontext")
    image = Image.radial_gradient("L").convert("RGB").resize((75, 50))
    picture = used.render({}, controls=[image], width=120, height=88, sampling="preview")
    assert picture.shape == (80, 112, 3)
    once = image.resize((120, 88), Image.Resampling.BILINEAR)
    twice = once.resize((112, 80), Image.Resampling.LANCZOS)
    assert np.array_equal(picture, used.render({}, controls=[twice], width=112, height=80))
