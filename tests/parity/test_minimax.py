"""Rules of MiniMax-H3 that the golden cases do not cover."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from cluster.jobs.model import Phase
from deployments.catalog import CATALOG
from deployments.engine.job import Unwatched
from deployments.engine.media import Media
from tests.parity.test_rules import Interrupted
from tests.support.studio import Studio

Get = Callable[[str], Studio]

IMAGE = Image.radial_gradient("L").convert("RGB").resize((120, 50))


@pytest.fixture
def used(studio: Get) -> Studio:
    return studio("minimax_h3")


def media(used: Studio, controls: list[Image.Image] | None = None, **fields: object) -> Media:
    return used.engine.render(used.prompt(**fields), controls or [], Unwatched())


def equal(one: Media, other: Media) -> bool:
    assert one.sound is not None and other.sound is not None
    return np.array_equal(one.pixels, other.pixels) and np.array_equal(one.sound.samples, other.sound.samples)


def test_the_number_of_frames() -> None:
    video = CATALOG["minimax_h3"].video
    assert video is not None
    frames = {2: 5, 5: 5, 21: 5, 22: 22, 38: 22, 107: 107, 120: 107, 124: 124, 1000: 991}
    assert {wanted: video.floor(wanted) for wanted in frames} == frames


def test_a_preview_of_one_frame_is_a_picture(used: Studio) -> None:
    made = media(used, num_frames=1, width=96, sampling="preview")
    assert made.pixels.shape == (1, 64, 96, 3)
    assert made.sound is None
    assert made.pixels.std() > 10
    with_image = media(used, [IMAGE], num_frames=1, width=96, sampling="preview")
    assert not np.array_equal(with_image.pixels, made.pixels)


@pytest.mark.parametrize(("wanted", "frames", "latents"), [(5, 5, 8), (38, 22, 37)])
def test_sound_lasts_as_long_as_the_frames_that_come_out(
    used: Studio, wanted: int, frames: int, latents: int
) -> None:
    made = media(used, num_frames=wanted, width=64)
    assert made.pixels.shape == (frames, 64, 64, 3)
    assert made.sound is not None
    assert made.sound.samples.shape == (2, latents * 800)


def test_as_many_steps_as_asked_for_from_one_to_zero(used: Studio) -> None:
    media(used, steps=4)
    pipeline = used.engine._pipeline
    for scheduler, shift in ((pipeline.scheduler, 12), (pipeline.audio_scheduler, 3)):
        grid = np.array([1, 0.75, 0.5, 0.25, 0])
        assert scheduler.sigmas.tolist() == pytest.approx(shift * grid / (1 + (shift - 1) * grid))
        assert len(scheduler.timesteps) == 4


def test_negative_prompt_and_guidance_have_no_effect(used: Studio) -> None:
    assert equal(media(used), media(used, neg="blurry", guidance=9.0))


def test_blanks_around_a_prompt_do_not_count_and_it_may_be_empty(used: Studio) -> None:
    assert equal(media(used, prompt=" a cat\n"), media(used, prompt="a cat"))
    assert equal(media(used, prompt=" "), media(used, prompt=""))
    assert not equal(media(used, prompt=""), media(used, prompt="a cat"))


def test_the_image_is_stretched_but_not_for_the_text_encoder_of_a_preview(used: Studio) -> None:
    stretched = IMAGE.resize((96, 64), Image.Resampling.LANCZOS)
    assert equal(media(used, [IMAGE]), media(used, [stretched]))
    assert not equal(media(used, [IMAGE], sampling="preview"), media(used, [stretched], sampling="preview"))
    assert equal(media(used, [stretched], sampling="preview"), media(used, [stretched]))
    assert not equal(media(used, [stretched]), media(used))


@pytest.mark.parametrize(("sampling", "same"), [("reference", False), ("preview", True)])
def test_only_previews_cut_a_prompt_at_512_tokens(used: Studio, sampling: str, same: bool) -> None:
    prompts = [f"{'the ' * 512}{word}" for word in ("cat", "dog in the snow")]
    one, other = (media(used, prompt=prompt, sampling=sampling) for prompt in prompts)
    assert equal(one, other) is same


class Decoding(Unwatched):
    """Ends a prompt at the second decoded piece."""

    def __init__(self) -> None:
        self.pieces = 0

    def on_phase(self, phase: Phase) -> None:
        self.pieces += phase is Phase.DECODE
        if self.pieces == 3:
            raise Interrupted


def test_decoding_can_be_interrupted(used: Studio) -> None:
    before = media(used)
    with pytest.raises(Interrupted):
        used.engine.render(used.prompt(num_frames=39), [], Decoding())
    assert equal(media(used), before)


def test_of_the_text_encoder_only_what_is_read_is_loaded(used: Studio) -> None:
    assert len(used.engine._pipeline.text_encoder.model.language_model.layers) == 51


def test_it_needs_no_torchvision(used: Studio) -> None:
    media(used, [IMAGE])
    assert find_spec("torchvision") is None or "torchvision" not in sys.modules
