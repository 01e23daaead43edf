"""Qwen-Image and its editing models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from deployments.catalog.control_choices import first, main_shown_twice
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Preview

if TYPE_CHECKING:
    from deployments.pipelines import qwen_image
else:
    qwen_image = LazyModule("deployments.pipelines.qwen_image")

QWEN_IMAGE_GIB: Mapping[str, float] = MappingProxyType(
    {"transformer": 38.1, "text_encoder": 15.5, "vae": 0.24}
)

SIZES_OF_32 = Preview(differs="Sizes are multiples of 32.", fields={"divisor": 32})

PLUS_PREVIEW = Preview(
    differs="Guidance is not rescaled. The text encoder sees control images in their own aspect ratio:"
    " `ctrl_img` besides `ctrl_img_1`, or twice if there is no `ctrl_img_1`. For the negative prompt the"
    " images are resized twice. For the latents, `ctrl_img` replaces `ctrl_img_1`.",
    fields={
        "arguments": qwen_image.edit_plus_preview_arguments,
        "during": qwen_image.without_rescale,
        "control_images": ControlImages(least=1, most=4, most_aspect=150, choose=main_shown_twice),
    },
)

ROWS = (
    ModelSpec(
        id="qwen_image",
        family="qwen_image",
        title="Qwen-Image",
        pipeline="QwenImagePipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image"),
        guidance_argument="true_cfg_scale",
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
        preview=SIZES_OF_32,
    ),
    ModelSpec(
        id="qwen_image_2512",
        family="qwen_image",
        title="Qwen-Image-2512",
        pipeline="QwenImagePipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-2512"),
        guidance_argument="true_cfg_scale",
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
        preview=SIZES_OF_32,
    ),
    ModelSpec(
        id="qwen_image_edit",
        family="qwen_image",
        title="Qwen-Image-Edit",
        pipeline="QwenImageEditPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit"),
        load_options={"processor": None},
        adjust=qwen_image.use_own_processor,
        arguments=qwen_image.edit_arguments,
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=1, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
        preview=Preview(
            differs="The text encoder sees the control image in its own aspect ratio. For the latents it is"
            " resized bilinearly. `ctrl_img` wins over the numbered control images.",
            fields={
                "arguments": qwen_image.edit_preview_arguments,
                "control_images": ControlImages(least=1, most=1, most_aspect=150, choose=first),
            },
        ),
    ),
    ModelSpec(
        id="qwen_image_edit_plus",
        family="qwen_image",
        title="Qwen-Image-Edit-2509",
        pipeline="QwenImageEditPlusPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit-2509"),
        load_options={"processor": None},
        adjust=qwen_image.use_own_processor,
        arguments=qwen_image.edit_plus_arguments,
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=3, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
        preview=PLUS_PREVIEW,
    ),
    ModelSpec(
        id="qwen_image_edit_plus_2511",
        family="qwen_image",
        title="Qwen-Image-Edit-2511",
        pipeline="QwenImageEditPlusPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit-2511"),
        load_options={"processor": None},
        adjust=qwen_image.use_own_processor,
        arguments=qwen_image.edit_plus_arguments,
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=3, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
        preview=PLUS_PREVIEW,
    ),
)
