"""LTX-2 and LTX-2.3: videos with sound, from text or from text and a first frame."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployments.catalog.control_choices import only_one
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import (
    Checkpoint,
    ControlImages,
    HighResolution,
    ModelSpec,
    Part,
    Preview,
    Video,
)

if TYPE_CHECKING:
    from deployments.pipelines import ltx2, ltx2_high
else:
    ltx2 = LazyModule("deployments.pipelines.ltx2")
    ltx2_high = LazyModule("deployments.pipelines.ltx2_high")

_GUIDED_BY_TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_guidance_scale": None,
        "audio_stg_scale": None,
        "audio_modality_scale": None,
        "audio_guidance_rescale": None,
        "spatio_temporal_guidance_blocks": None,
        "use_cross_timestep": False,
    }
)
"""Only the request's own guidance, for sound and picture alike; diffusers adds more by default."""

_TRAINER_S_GUIDANCE: Mapping[str, Any] = MappingProxyType(
    {
        "stg_scale": 1.0,
        "modality_scale": 3.0,
        "guidance_rescale": 0.7,
        "audio_guidance_scale": 7.0,
        "audio_stg_scale": 1.0,
        "audio_modality_scale": 3.0,
        "audio_guidance_rescale": 0.7,
        "spatio_temporal_guidance_blocks": [28],
        "use_cross_timestep": True,
    }
)

_PREVIEW: Mapping[str, Any] = MappingProxyType(
    {"arguments": ltx2.preview_arguments, "during": ltx2.reversed_text, "high": None}
)
_PREVIEW_DIFFERS = (
    "The text tokens are in reverse order, as in the trainer's version of diffusers. `fps` changes only the"
    " file: motion and sound are made for 24 frames per second, and the sound is as long as the rendered"
    " frames."
)

_GEMMA_GIB = 22.7

ROWS = (
    ModelSpec(
        id="ltx2",
        family="ltx2",
        title="LTX-2",
        pipeline="LTX2Pipeline",
        image_pipeline="LTX2ImageToVideoPipeline",
        checkpoint=Checkpoint(
            repo="Lightricks/LTX-2",
            without=("text_encoder/diffusion_pytorch_model*",),
        ),
        adjust=ltx2.keep_the_shift,
        arguments=ltx2.arguments,
        call_options=_GUIDED_BY_TEXT,
        control_images=ControlImages(most=1, choose=only_one),
        video=Video(fps=24, step=8, sound_rate=24_000, formats=("mp4",)),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib={
            "transformer": 35.2,
            "text_encoder": _GEMMA_GIB,
            "connectors": 2.7,
            "vae": 2.3,
            "audio_vae": 0.1,
            "vocoder": 0.1,
        },
        activations_gib=6.0,
        licence="ltx-2-community-license",
        preview=Preview(differs=_PREVIEW_DIFFERS, fields=_PREVIEW),
    ),
    ModelSpec(
        id="ltx2.3",
        family="ltx2",
        title="LTX-2.3",
        pipeline="LTX2Pipeline",
        image_pipeline="LTX2ImageToVideoPipeline",
        checkpoint=Checkpoint(repo="dg845/LTX-2.3-Diffusers"),
        adjust=ltx2.keep_the_shift,
        arguments=ltx2.arguments,
        call_options=_GUIDED_BY_TEXT,
        high=HighResolution(
            render=ltx2_high.render_high,
            upsampler=Part(
                class_name="diffusers.pipelines.ltx2.LTX2LatentUpsamplerModel",
                checkpoint=Checkpoint(repo="dg845/LTX-2.3-Spatial-Upsampler-Diffusers"),
                folder="latent_upsampler",
            ),
            lora=Checkpoint(repo="CalamitousFelicitousness/LTX-2.3-distilled-lora-384-Diffusers"),
            multiplier=0.8,
        ),
        control_images=ControlImages(most=1, choose=only_one),
        video=Video(fps=24, step=8, sound_rate=48_000, formats=("mp4",)),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib={
            "transformer": 35.4,
            "text_encoder": _GEMMA_GIB,
            "connectors": 5.9,
            "vae": 2.3,
            "audio_vae": 0.1,
            "vocoder": 0.3,
        },
        activations_gib=6.0,
        licence="ltx-2-community-license",
        preview=Preview(
            differs=_PREVIEW_DIFFERS + " Guidance has three more terms, active at any `guidance_scale`.",
            fields={**_PREVIEW, "call_options": _TRAINER_S_GUIDANCE},
        ),
    ),
)
