"""MiniMax-H3: videos with sound, from text or from text and a first frame."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployments.catalog.control_choices import first_as_sent
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Part, Preview, Video

if TYPE_CHECKING:
    from deployments.pipelines import minimax_h3, qwen_image
else:
    minimax_h3 = LazyModule("deployments.pipelines.minimax_h3")
    qwen_image = LazyModule("deployments.pipelines.qwen_image")

H3 = Checkpoint(repo="MiniMaxAI/MiniMax-H3")

VIDEO = Video(
    frames=107,
    fps=24,
    least=5,
    step=17,
    fewest=2,
    other_fps="refused",
    sound_rate=32_000,
    formats=("mp4",),
)


def _part(class_name: str | type[Any], folder: str) -> Part:
    return Part(class_name=class_name, checkpoint=H3, folder=folder)


ROWS = (
    ModelSpec(
        id="minimax_h3",
        family="minimax",
        title="MiniMax-H3",
        pipeline=minimax_h3.MiniMaxH3Pipeline,
        checkpoint=H3,
        assembled=True,
        parts={
            "text_encoder": _part(minimax_h3.TextEncoder, "text_encoder"),
            "tokenizer": _part("transformers.Qwen2TokenizerFast", "tokenizer"),
            # Resizes like torchvision; the library's own processor requires torchvision itself.
            "image_processor": _part(qwen_image.ImageProcessor, "processor"),
            "transformer": _part("diffusers.MiniMaxH3Transformer3DModel", "transformer"),
            "vae": _part("diffusers.AutoencoderKLMiniMaxH3", "vae"),
            "audio_vae": _part("diffusers.AutoencoderKLMiniMaxH3Audio", "audio_vae"),
            "audio_scheduler": _part("diffusers.MiniMaxH3Scheduler", "audio_scheduler"),
        },
        scheduler=("MiniMaxH3Scheduler", MappingProxyType({"shift": 12.0})),
        arguments=minimax_h3.arguments,
        negative_prompt=False,
        control_images=ControlImages(most=1, choose=first_as_sent),
        video=VIDEO,
        width=768,
        height=768,
        steps=28,
        guidance=1.0,
        divisor=32,
        memory_gib={"transformer": 61.7, "text_encoder": 49.7, "vae": 4.8, "audio_vae": 0.6},
        activations_gib=8.0,
        licence="minimax-community",
        preview=Preview(
            differs="The text encoder sees the control image at its original size, and only the first 512"
            " tokens of a prompt. `fps` is ignored. A request for one frame gets one frame, without sound.",
            fields={
                "arguments": minimax_h3.preview_arguments,
                "video": replace(VIDEO, other_fps="ignored", fewest=1),
            },
        ),
    ),
)
