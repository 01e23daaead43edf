"""Tiled decoding: only for models that the operator names, and only for images larger than a tile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from deployments.engine.tiling import tiled_decode
from tests.support.studio import Studio, largest_difference

Get = Callable[..., Studio]


@pytest.mark.parametrize("model", ["flux", "wan21_1b", "qwen_image", "ltx2", "minimax_h3"])
def test_what_fits_into_a_tile_stays_the_same(new_studio: Get, studio: Get, model: str) -> None:
    tiling = new_studio(model, vae_tiling=True)
    assert tiling.engine.describe()["vae_tiling"] is True
    assert np.array_equal(tiling.render({}), studio(model).render({}))


def test_what_is_larger_is_blended(new_studio: Get, studio: Get) -> None:
    size = {"width": 320, "height": 128, "steps": 1}
    whole, tiled = (
        used.render({}, **size) for used in (studio("krea2"), new_studio("krea2", vae_tiling=True))
    )
    assert whole.shape == tiled.shape
    assert largest_difference(whole, tiled) > 0


def test_only_decoding_is_tiled(studio: Get) -> None:
    vae = studio("krea2").engine._pipeline.vae
    seen = []
    with tiled_decode(vae), vae.decoder.register_forward_pre_hook(lambda *_: seen.append(vae.use_tiling)):
        vae.decode(torch.zeros(1, 16, 1, 4, 4))
        assert not vae.use_tiling
    vae.decode(torch.zeros(1, 16, 1, 4, 4))
    assert (seen, vae.use_tiling) == ([True], False)
