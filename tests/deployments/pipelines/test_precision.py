"""Parts and values that stay float32 when the models run in bfloat16, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image

from deployments.engine.job import Unwatched
from deployments.engine.loading import Loader
from tests.support.studio import Studio

NewStudio = Callable[[str], Studio]


@pytest.fixture
def in_bfloat16(new_studio: NewStudio, monkeypatch: pytest.MonkeyPatch) -> NewStudio:
    monkeypatch.setattr(Loader, "dtype", torch.bfloat16)
    return new_studio


@pytest.mark.parametrize(
    "model",
    [
        "zimage_deturbo",
        "qwen_image",
        "qwen_image_edit_plus",
        "lumina2",
        "krea2",
        "krea2_o_edit",
        "hidream",
        "hidream_e1",
        "hidream_o1",
        "omnigen2",
        "ltx2",
        "minimax_h3",
    ],
)
def test_rotary_frequencies(in_bfloat16: NewStudio, model: str) -> None:
    """Rounding would shift the angles: by a radian at the 500th position."""
    parts = in_bfloat16(model).engine._pipeline.components.values()
    models = [part for part in parts if isinstance(part, torch.nn.Module)]
    frequencies = [
        buffer for part in models for name, buffer in part.named_buffers() if name.endswith("inv_freq")
    ]
    assert frequencies
    assert {buffer.dtype for buffer in frequencies} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for part in models for parameter in part.parameters()}


def test_the_latents_of_krea_2(in_bfloat16: NewStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    used = in_bfloat16("krea2")
    pipeline, seen = used.engine._pipeline, []
    step = pipeline.scheduler.step

    def watch(
        prediction: torch.Tensor, time: torch.Tensor, latents: torch.Tensor, **options: object
    ) -> object:
        seen.append((prediction.dtype, latents.dtype, torch.equal(latents, latents.bfloat16().float())))
        return step(prediction, time, latents, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", watch)
    used.picture(steps=2)
    assert seen == [(torch.float32, torch.float32, False)] * 2


def test_high_resolution_and_sound(in_bfloat16: NewStudio) -> None:
    """Each part gets inputs in its own dtype; the final sound is float32."""
    used = in_bfloat16("ltx2.3")
    made = used.engine.render(used.prompt(resolution="High"), [], Unwatched())
    assert made.pixels.shape == (1, 128, 192, 3)
    assert made.sound is not None
    assert made.sound.samples.dtype == np.float32


@pytest.mark.parametrize(
    ("model", "sampling", "image", "rounded"),
    [
        ("wan22_14b_i2v", "reference", True, True),
        ("wan22_14b_i2v", "preview", True, True),
        ("wan22_5b", "reference", True, False),
        ("wan22_5b", "preview", True, True),
        ("wan22_5b", "preview", False, False),
    ],
)
def test_the_noise_of_wan(
    in_bfloat16: NewStudio,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    sampling: str,
    image: bool,
    rounded: bool,
) -> None:
    """Sampling from an image rounds the noise, except in the reference server for the 5B model."""
    used, seen = in_bfloat16(model), []
    for scheduler in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler):

        def watch(
            self: object, *arguments: torch.Tensor, own: Any = scheduler.step, **options: object
        ) -> Any:
            latents = arguments[2]
            seen.append((latents.dtype, torch.equal(latents, latents.bfloat16().float())))
            return own(self, *arguments, **options)

        monkeypatch.setattr(scheduler, "step", watch)
    used.picture(steps=2, sampling=sampling, controls=[Image.new("RGB", (96, 64))] if image else [])
    assert seen[0] == (torch.float32, rounded)


def test_the_tokens_of_flux_2_s_references(new_studio: NewStudio) -> None:
    """The tokens have bfloat16 values even if the models are float32."""
    pipeline = new_studio("flux2_klein_4b").engine._pipeline
    image = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    tokens, _ = pipeline.prepare_image_latents([image], 1, None, torch.device("cpu"), torch.float32)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, tokens.bfloat16().float())


def test_the_ends_of_minimax_h3(in_bfloat16: NewStudio) -> None:
    """The first and last layers and the sound decoder are float32, as in training."""
    used = in_bfloat16("minimax_h3")
    used.picture()
    parts = used.engine._pipeline.components
    assert {parameter.dtype for parameter in parts["audio_vae"].parameters()} == {torch.float32}
    assert parts["transformer"].proj_in.weight.dtype == torch.float32
    assert parts["transformer"].proj_out.weight.dtype == torch.float32
    assert parts["transformer"].transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
