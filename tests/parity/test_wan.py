"""Rules of Wan that the golden cases do not cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cluster.jobs.model import Phase
from deployments.catalog import CATALOG
from deployments.engine.job import Unwatched
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora
from tests.support.studio import Studio, largest_difference

Get = Callable[[str], Studio]

WAN = [row.id for row in CATALOG.values() if row.family == "wan"]

MOE = "wan22_14b_t2v"


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one, other))


@pytest.mark.parametrize(
    ("models", "frames"),
    [
        (
            ("wan21_1b", "wan21_14b", "wan21_i2v_14b", "wan21_i2v_14b480p", "wan22_14b_t2v"),
            {1: 1, 3: 1, 4: 5, 5: 5, 6: 5, 8: 9, 9: 9, 41: 41, 80: 81, 1000: 1001},
        ),
        (("wan22_14b_i2v", "wan22_5b"), {1: 1, 3: 1, 4: 1, 5: 5, 8: 5, 9: 9, 41: 41, 80: 77, 1000: 997}),
    ],
)
def test_the_number_of_frames(models: tuple[str, ...], frames: dict[int, int]) -> None:
    for model in models:
        video = CATALOG[model].video
        assert video is not None
        assert {wanted: video.floor(wanted) for wanted in frames} == frames


@pytest.mark.parametrize(("model", "frames"), [("wan21_1b", 9), ("wan22_5b", 5)])
def test_as_many_frames_come_out(studio: Get, model: str, frames: int) -> None:
    assert studio(model).render({}, num_frames=8, width=64).shape == (frames, 64, 64, 3)


@pytest.mark.parametrize("model", WAN)
def test_the_schedule(studio: Get, model: str) -> None:
    used = studio(model)
    used.render({}, steps=4, num_frames=1, width=64)
    shift_5 = model in ("wan21_i2v_14b", "wan22_5b")
    expected = [999, 937, 833, 625] if shift_5 else [999, 900, 750, 500]
    assert used.engine._pipeline.scheduler.timesteps.tolist() == expected


@pytest.mark.parametrize("model", ["wan21_1b", "wan22_5b"])
def test_guidance_above_one_guides(studio: Get, model: str) -> None:
    used = studio(model)
    for guidance, ignored in ((0.0, True), (1.0, True), (3.0, False)):
        one, other = (used.render({}, neg=neg, guidance=guidance, num_frames=1) for neg in ("blurry", ""))
        assert equal(one, other) is ignored


def test_512_tokens_of_a_prompt_are_read(studio: Get) -> None:
    used = studio("wan21_1b")
    long, longer = "a " * 500, "a " * 512
    one, other = (
        used.render({}, prompt=f"{long}{word}", num_frames=1) for word in ("cat", "dog in the snow")
    )
    assert not equal(one, other)
    one, other = (
        used.render({}, prompt=f"{longer}{word}", num_frames=1) for word in ("cat", "dog in the snow")
    )
    assert equal(one, other)


@pytest.mark.parametrize("model", ["wan21_i2v_14b", "wan22_14b_i2v", "wan22_5b"])
def test_the_control_image_is_stretched(studio: Get, model: str) -> None:
    used = studio(model)
    image = Image.radial_gradient("L").convert("RGB").resize((300, 40))
    stretched = image.resize((96, 64), Image.Resampling.LANCZOS)
    video = used.render({}, controls=[image])
    assert equal(video, used.render({}, controls=[stretched]))
    assert not equal(video, used.render({}, controls=[Image.new("RGB", (300, 40))]))


def test_one_id_goes_by_text_or_by_an_image_too(studio: Get) -> None:
    used = studio("wan22_5b")
    image = Image.radial_gradient("L").convert("RGB")
    text = used.render({}, controls=[])
    assert not equal(text, used.render({}, controls=[image]))
    assert equal(text, used.render({}, controls=[]))


@pytest.mark.parametrize("model", ["wan21_i2v_14b", "wan22_14b_i2v", "wan22_5b"])
def test_a_preview_leaves_nothing_behind(studio: Get, model: str) -> None:
    used = studio(model)
    before = used.render({}, num_frames=1)
    assert not equal(before, used.render({}, num_frames=1, sampling="preview"))
    assert equal(before, used.render({}, num_frames=1))


def with_expert(file: LoraFile, expert: str) -> LoraFile:
    return replace(file, expert=expert)


def test_each_transformer_has_its_own_lora_and_multiplier(studio: Get) -> None:
    used = studio(MOE)
    high, low = used.files("style_high_noise.safetensors")

    def video(*loras: tuple[LoraFile, float]) -> bytes:
        used.engine.use(loras)
        return used.picture(steps=4).tobytes()

    plain, both = video(), video((high, 1.0), (low, 1.0))
    assert both == video((low, 1.0), (high, 1.0)), "their order is irrelevant"
    assert video((high, 1.0), (low, 0.0)) == video((high, 1.0)), "the other transformer runs without a LoRA"
    assert video((high, 0.0), (low, 1.0)) == video((low, 1.0))
    swapped = (with_expert(high, "low"), 1.0), (with_expert(low, "high"), 1.0)
    same_file = (high, 1.0), (with_expert(high, "low"), 1.0)
    others = [
        video((high, 0.5), (low, 1.3)),
        video((high, 1.3), (low, 0.5)),
        video((high, 1.0)),
        video((low, 1.0)),
        video(*swapped),
        video(*same_file),
    ]
    assert len({plain, both, *others}) == 8
    assert both == video((high, 1.0), (low, 1.0)), "the other LoRAs leave nothing behind"


def test_both_against_peft(studio: Get, new_studio: Get) -> None:
    used, other = studio(MOE), new_studio(MOE)
    high, low = used.files("style_high_noise.safetensors")
    used.engine.use([(high, 0.5), (low, 1.3)])
    pipeline = other.engine._pipeline
    pipeline.load_lora_weights(load_file(high.path), adapter_name="high")
    pipeline.load_lora_weights(load_file(low.path), adapter_name="low", load_into_transformer_2=True)
    pipeline.transformer.set_adapters(["high"], [0.5])
    pipeline.transformer_2.set_adapters(["low"], [1.3])
    assert largest_difference(used.picture(steps=4), other.picture(steps=4)) <= 1


def test_loras_of_any_rank_follow_each_other(studio: Get, tmp_path: Path) -> None:
    """The reference server accepts no rank above 32."""
    used = studio(MOE)
    layer = used.engine._pipeline.transformer.get_submodule("blocks.0.attn1.to_q")
    pictures = []
    for rank in (4, 80, 1, 80, 4):
        generator = torch.Generator().manual_seed(rank)
        down = torch.randn(rank, layer.in_features, generator=generator)
        up = torch.randn(layer.out_features, rank, generator=generator) / rank
        name = f"rank_{rank}.safetensors"
        stem = "diffusion_model.blocks.0.self_attn.q"
        save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / name)
        used.engine.use([(with_expert(open_lora(tmp_path, name), "low"), 1.0)])
        pictures.append(used.picture(steps=4).tobytes())
    assert pictures[:2] == pictures[:2:-1]
    assert len(set(pictures)) == 3


def test_what_wan_22_lacks_of_an_image_lora_of_wan_21_is_told(studio: Get) -> None:
    used, source = studio("wan22_14b_i2v"), studio("wan21_i2v_14b")
    (file,) = source.files(source.names[0])
    (warning,) = used.engine.use([(with_expert(file, "high"), 1.0)])
    assert "_img" in warning and "match no layer" in warning and "Wan 2.1" in warning


class Interrupted(Exception):
    """Raised by the observer below."""


class Pieces(Unwatched):
    """Counts the calls of each phase; with `interrupts`, ends the prompt at the third decoded piece."""

    def __init__(self, *, interrupts: bool = False) -> None:
        self.calls: dict[Phase, int] = {}
        self.interrupts = interrupts

    def on_phase(self, phase: Phase) -> None:
        self.calls[phase] = self.calls.get(phase, 0) + 1
        if self.interrupts and self.calls.get(Phase.DECODE) == 3:
            raise Interrupted


def test_every_piece_of_encoding_and_decoding_is_heard(studio: Get) -> None:
    """Nine frames are three latents and 17 are five; layers outside the pieces are reported once."""
    used, observers = studio("wan22_14b_i2v"), (Pieces(), Pieces())
    for frames, observer in zip((9, 17), observers, strict=True):
        used.engine.render(used.prompt(num_frames=frames), used.controls, observer)
    short, long = (observer.calls for observer in observers)
    assert short[Phase.STEP] == long[Phase.STEP] == 1
    for phase in (Phase.ENCODE, Phase.DECODE):
        assert long[phase] > 1.6 * short[phase] > 3 * 10


def test_decoding_can_be_interrupted(studio: Get) -> None:
    used = studio("wan21_1b")
    before = used.render({}, num_frames=9)
    with pytest.raises(Interrupted):
        used.engine.render(used.prompt(num_frames=17, seed=9), [], Pieces(interrupts=True))
    assert equal(used.render({}, num_frames=9), before)
