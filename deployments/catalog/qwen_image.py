"""Qwen-Image and its editing models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from deployments.catalog.spec import Checkpoint, ControlImages, ModelSpec

QWEN_IMAGE_GIB: Mapping[str, float] = MappingProxyType(
    {"transformer": 38.1, "text_encoder": 15.5, "vae": 0.24}
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
    ),
    ModelSpec(
        id="qwen_image_edit",
        family="qwen_image",
        title="Qwen-Image-Edit",
        pipeline="QwenImageEditPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit"),
        load_options={"processor": None},
        adjust="use_own_processor",
        arguments="edit_arguments",
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=1, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="qwen_image_edit_plus",
        family="qwen_image",
        title="Qwen-Image-Edit-2509",
        pipeline="QwenImageEditPlusPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit-2509"),
        load_options={"processor": None},
        adjust="use_own_processor",
        arguments="edit_plus_arguments",
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=3, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="qwen_image_edit_plus_2511",
        family="qwen_image",
        title="Qwen-Image-Edit-2511",
        pipeline="QwenImageEditPlusPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit-2511"),
        load_options={"processor": None},
        adjust="use_own_processor",
        arguments="edit_plus_arguments",
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=3, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
)
