"""Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ModelSpec, Preview

if TYPE_CHECKING:
    from deployments.pipelines import sd
else:
    sd = LazyModule("deployments.pipelines.sd")

TRAINER_DDPM: tuple[str, Mapping[str, Any]] = (
    "DDPMScheduler",
    MappingProxyType(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "prediction_type": "epsilon",
            "steps_offset": 0,
            "timestep_spacing": "leading",
        }
    ),
)
"""The trainer's `ddpm` sampler. It is stochastic: noise comes from the prompt's own generator."""

PREVIEW_DDPM: tuple[str, Mapping[str, Any]] = (
    TRAINER_DDPM[0],
    MappingProxyType({**TRAINER_DDPM[1], "steps_offset": 1}),
)
"""Each timestep is one higher: the constructor of Stable Diffusion 1.5's pipeline allows no other offset."""

ROWS = (
    ModelSpec(
        id="sd15",
        family="sd",
        title="Stable Diffusion 1.5",
        pipeline="StableDiffusionPipeline",
        checkpoint=Checkpoint(repo="stable-diffusion-v1-5/stable-diffusion-v1-5", variant="fp16"),
        scheduler=TRAINER_DDPM,
        # The checker turns flagged pictures black; the trainer's previews do not use one.
        load_options={"safety_checker": None, "requires_safety_checker": False},
        steps=25,
        guidance=6.0,
        divisor=8,
        memory_gib={"unet": 1.6, "text_encoder": 0.23, "vae": 0.16},
        licence="CreativeML OpenRAIL-M",
        preview=Preview(differs="Each timestep is one higher.", fields={"scheduler": PREVIEW_DDPM}),
    ),
    ModelSpec(
        id="sdxl",
        family="sd",
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        checkpoint=Checkpoint(repo="stabilityai/stable-diffusion-xl-base-1.0", variant="fp16"),
        scheduler=TRAINER_DDPM,
        load_options={"add_watermarker": False},
        steps=30,
        guidance=5.0,
        divisor=8,
        memory_gib={"unet": 4.8, "text_encoder_2": 1.29, "text_encoder": 0.23, "vae": 0.16},
        licence="CreativeML Open RAIL++-M",
        preview=Preview(
            differs="In prompts, `--gr` sets guidance rescale, and `--n` is only for the first text encoder.",
            fields={"arguments": sd.flag_arguments},
        ),
    ),
)
