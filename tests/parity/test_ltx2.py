"""Rules of LTX-2 and LTX-2.3 that the golden cases do not cover."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.jobs.model import Phase
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine
from deployments.engine.job import Unwatched
from deployments.engine.media import Media
from deployments.engine.tiny import materialize
from deployments.loras.sources.lora_root import open_lora
from tests.parity.cases import FOLDER, load_deep_preview
from tests.parity.test_rules import Interrupted, Recording
from tests.support.studio import Studio

Get = Callable[[str], Studio]

LTX = ["ltx2", "ltx2.3"]
IMAGE = Image.radial_gradient("L").convert("RGB")


def media(used: Studio, controls: list[Image.Image] | None = None, **fields: object) -> Media:
    return used.engine.render(used.prompt(**fields), controls or [], Unwatched())


def equal(one: Media, other: Media) -> bool:
    assert one.sound is not None and other.sound is not None
    return np.array_equal(one.pixels, other.pixels) and np.array_equal(one.sound.samples, other.sound.samples)


def seconds(made: Media) -> float:
    assert made.sound is not None
    return made.sound.samples.shape[1] / made.sound.rate


@pytest.mark.parametrize("model", LTX)
def test_the_number_of_frames(model: str) -> None:
    video = CATALOG[model].video
    assert video is not None
    frames = {1: 1, 8: 1, 9: 9, 12: 9, 16: 9, 17: 17, 41: 41, 1000: 993}
    assert {wanted: video.floor(wanted) for wanted in frames} == frames


@pytest.mark.parametrize("model", LTX)
@pytest.mark.parametrize("size", [(64, 64), (192, 128)])
def test_the_schedule_is_the_same_at_every_size(studio: Get, model: str, size: tuple[int, int]) -> None:
    used = studio(model)
    media(used, steps=4, width=size[0], height=size[1])
    sigmas = used.engine._pipeline.scheduler.sigmas.tolist()
    assert sigmas == pytest.approx([1, 0.8671, 0.6316, 0.1, 0], abs=1e-4)


def test_sound_lasts_as_long_as_the_frames_asked_for(studio: Get) -> None:
    """Sound has 25 latents per second; four latents make 4 * 4 - 3 spectra of 10 ms."""
    used = studio("ltx2")
    made = media(used, num_frames=16, fps=16)
    assert len(made.pixels) == 9
    assert seconds(made) == pytest.approx(0.97)
    preview = media(used, num_frames=16, fps=16, sampling="preview")
    assert len(preview.pixels) == 9
    assert seconds(preview) == pytest.approx(0.33)
    assert preview.fps == 16


def test_the_rate_moves_the_picture_but_not_of_a_preview(studio: Get) -> None:
    used = studio("ltx2")
    for sampling, same in (("reference", False), ("preview", True)):
        slow, fast = (media(used, num_frames=9, fps=fps, sampling=sampling) for fps in (12, 24))
        assert np.array_equal(slow.pixels, fast.pixels) is same


@pytest.mark.parametrize("model", LTX)
def test_one_id_goes_by_text_or_by_an_image_that_is_stretched(studio: Get, model: str) -> None:
    used, image = studio(model), IMAGE.resize((300, 40))
    text = media(used)
    by_image = media(used, [image])
    assert not equal(text, by_image)
    assert equal(by_image, media(used, [image.resize((96, 64), Image.Resampling.LANCZOS)]))
    assert equal(text, media(used))


@pytest.mark.parametrize("sampling", ["reference", "preview"])
@pytest.mark.parametrize("model", LTX)
def test_only_previews_of_ltx_2_3_guide_at_1(studio: Get, model: str, sampling: str) -> None:
    used = studio(model)
    one, other = (media(used, guidance=1.0, neg=neg, sampling=sampling) for neg in ("", "blurry"))
    assert equal(one, other) is ((model, sampling) != ("ltx2.3", "preview"))


def test_a_preview_of_a_deep_model(tmp_path: Path) -> None:
    """Only a deep model has block 28, which the trainer's guidance perturbs."""
    case, override = load_deep_preview()
    ((repo, parts),) = override.items()
    folder = repo.replace("/", "--")
    shutil.copytree(FOLDER / case.model / "checkpoint" / folder, tmp_path / "configs")
    for part, changes in parts.items():
        file = tmp_path / "configs" / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    materialize(tmp_path / "configs", tmp_path / "mirror" / folder)
    engine = Engine(CATALOG[case.model], Checkpoints(tmp_path / "mirror", None), device="cpu")
    engine.load()
    (lora,), (body,) = case.request["loras"], case.request["prompts"]
    engine.use([(open_lora(case.loras, lora["path"]), 1.0)])
    fields = {"width": body["width"], "height": body["height"], "steps": body["sample_steps"]}
    prompt = Studio(engine).prompt(
        **fields, prompt=body["prompt"], num_frames=9, fps=24, seed=case.seeds[0], sampling="preview"
    )
    made = engine.render(prompt, [], Unwatched())
    assert made.sound is not None
    case.check([made.pixels])
    case.check_sounds([made.sound])


class Refining(Unwatched):
    """Ends a prompt after the first refining step."""

    def __init__(self) -> None:
        self.decoding = 0

    def on_phase(self, phase: Phase) -> None:
        self.decoding += phase is Phase.DECODE
        if self.decoding == 2:
            raise Interrupted


def test_high_resolution_leaves_nothing_behind(studio: Get) -> None:
    used = studio("ltx2.3")
    lora = used.files(used.names[0])[0]
    used.engine.use([(lora, 0.7)])
    plain = media(used, [IMAGE])
    with pytest.raises(Interrupted):
        used.engine.render(used.prompt(resolution="High"), [IMAGE], Refining())
    assert equal(media(used, [IMAGE]), plain)
    high = media(used, [IMAGE], resolution="High")
    assert high.pixels.shape == (1, 128, 192, 3)
    assert high.sound is not None and plain.sound is not None
    assert np.array_equal(high.sound.samples, plain.sound.samples)
    assert equal(media(used, [IMAGE]), plain)
    assert not used.engine._pipeline.vae.use_tiling


def test_an_observer_of_high_resolution_hears_of_each_step(studio: Get) -> None:
    used, observer = studio("ltx2.3"), Recording()
    used.engine.render(used.prompt(steps=2, resolution="High"), [], observer)
    assert observer.seen == [Phase.ENCODE, Phase.STEP, (1, 2), (2, 2), Phase.DECODE]
