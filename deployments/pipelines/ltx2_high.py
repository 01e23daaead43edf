"""LTX-2.3 in high resolution: a video, its latents upsampled twofold, and three more steps on them."""

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
"""Of the steps that refine, as the reference server has them; the noise begins at the first."""


def render_high(
    pipeline: Any,  # noqa: ANN401 - any diffusers pipeline
    text_pipeline: Any,  # noqa: ANN401
    arguments: dict[str, Any],
    upsampler: torch.nn.Module,
    refined: Callable[[], AbstractContextManager[None]],
    progress: Progress,
) -> LTX2PipelineOutput:
    """Render with `pipeline`, then refine at twice the size with `text_pipeline`, without a control image.

    The sound is the first stage's. `refined` makes the LoRA for refining active while it lasts. Both stages
    draw from the one generator in `arguments`.
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
    """Take the steps as they are, without a shift, and decode in tiles."""
    own = pipeline.scheduler
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        own.config, use_dynamic_shifting=False, shift_terminal=None
    )
    try:
        with tiled_decode(pipeline.vae):
            yield
    finally:
        pipeline.scheduler = own
