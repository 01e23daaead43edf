"""LTX-2.3 in high resolution: renders a video, upsamples its latents twofold and refines them in 3 steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from deployments.engine.progress import Progress
from deployments.engine.tiling import tiled_decode

_SIGMAS = (0.909375, 0.725, 0.421875)
"""Sigmas of the refining steps, as in the reference server. The first one is also the noise scale."""


def render_high(
    pipeline: Any,  # noqa: ANN401 - any diffusers pipeline
    text_pipeline: Any,  # noqa: ANN401
    arguments: dict[str, Any],
    upsampler: torch.nn.Module,
    refined: Callable[[], AbstractContextManager[None]],
    progress: Progress,
) -> LTX2PipelineOutput:
    """Render with `pipeline`, then refine at twice the size with `text_pipeline`, without a control image.

    The sound comes from the first stage. `refined` is a context that activates the refining LoRA. Both stages
    draw from the generator in `arguments`.
    """
    options = {"callback_on_step_end": progress.after_step, "output_type": "latent", "return_dict": False}
    latents, audio_latents = pipeline(**arguments, **options)
    spectrogram = pipeline.audio_vae.decode(audio_latents.to(pipeline.audio_vae.dtype), return_dict=False)[0]
    audio = pipeline.vocoder(spectrogram)
    parameter = next(upsampler.parameters())
    refining = {name: value for name, value in arguments.items() if name not in ("image", "image_crf")} | {
        "latents": upsampler(latents.to(parameter.device, parameter.dtype)),
        "audio_latents": audio_latents,
        "width": 2 * arguments["width"],
        "height": 2 * arguments["height"],
        "num_inference_steps": len(_SIGMAS),
        "sigmas": list(_SIGMAS),
        "noise_scale": _SIGMAS[0],
        "guidance_scale": 1.0,
    }
    with refined(), _refining(text_pipeline):
        frames = text_pipeline(
            **refining, callback_on_step_end=progress.after_piece, output_type="np", return_dict=False
        )[0]
    return LTX2PipelineOutput(frames=frames, audio=audio)


@contextmanager
def _refining(pipeline: Any) -> Iterator[None]:  # noqa: ANN401 - any diffusers pipeline
    """Use the sigmas without a shift, and decode in tiles."""
    original = pipeline.scheduler
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        original.config, use_dynamic_shifting=False, shift_terminal=None
    )
    try:
        with tiled_decode(pipeline.vae):
            yield
    finally:
        pipeline.scheduler = original
