"""Wan 2.1 and 2.2: videos from text, from an image, or from either."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployments.catalog.control_choices import only_one
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Part, Preview, Video

if TYPE_CHECKING:
    from deployments.pipelines import wan
else:
    wan = LazyModule("deployments.pipelines.wan")

_UNIPC: Mapping[str, Any] = MappingProxyType(
    {"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
)
UNIPC_SHIFT_3 = ("UniPCMultistepScheduler", MappingProxyType({**_UNIPC, "flow_shift": 3.0}))
UNIPC_SHIFT_5 = ("UniPCMultistepScheduler", MappingProxyType({**_UNIPC, "flow_shift": 5.0}))

_EULER: Mapping[str, Any] = MappingProxyType({"num_train_timesteps": 1000, "use_dynamic_shifting": False})
EULER_SHIFT_3 = ("FlowMatchEulerDiscreteScheduler", MappingProxyType({**_EULER, "shift": 3.0}))
EULER_SHIFT_5 = ("FlowMatchEulerDiscreteScheduler", MappingProxyType({**_EULER, "shift": 5.0}))
"""The trainer's schedules: shift 3 for Wan 2.1, shift 5 for every Wan 2.2."""

ROUNDED = Video(multiples_go_up=True)
FLOORED = Video()

TEXT_GIB, VAE_GIB = 10.6, 0.24

T2V_14B_GIB: Mapping[str, float] = MappingProxyType(
    {"transformer": 26.6, "text_encoder": TEXT_GIB, "vae": VAE_GIB}
)
I2V_14B_GIB: Mapping[str, float] = MappingProxyType(
    {"transformer": 30.5, "text_encoder": TEXT_GIB, "image_encoder": 1.2, "vae": VAE_GIB}
)
MOE_14B_GIB: Mapping[str, float] = MappingProxyType(
    {"transformer": 26.6, "transformer_2": 26.6, "text_encoder": TEXT_GIB, "vae": VAE_GIB}
)

EXPERTS: Mapping[str, str] = MappingProxyType({"high": "transformer", "low": "transformer_2"})
"""The transformer for the first, noisier steps, and the one for the later steps."""

T2V_EXPERTS = Checkpoint(repo="ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16")
I2V_EXPERTS = Checkpoint(repo="ai-toolkit/Wan2.2-I2V-A14B-Diffusers-bf16")
UMT5 = Checkpoint(repo="ai-toolkit/umt5_xxl_encoder")
I2V_720P = Checkpoint(repo="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers")
I2V_480P = Checkpoint(repo="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")

TRANSFORMER = "diffusers.WanTransformer3DModel"
# Named, since transformers picks another one if torchvision is installed: they differ by up to 2 of 255.
CLIP_PROCESSOR = "transformers.CLIPImageProcessorPil"

EULER_3 = Preview(
    differs="It uses Euler steps instead of UniPC.",
    fields={"scheduler": EULER_SHIFT_3},
)
EULER_3_FROM_IMAGE = Preview(
    differs="It uses Euler steps with shift 3 instead of UniPC. CLIP sees the control image resized by"
    " torchvision instead of Pillow.",
    fields={"scheduler": EULER_SHIFT_3, "during": wan.trainer_resize},
)

ROWS = (
    ModelSpec(
        id="wan21_1b",
        family="wan",
        title="Wan 2.1 1.3B",
        pipeline="WanPipeline",
        checkpoint=Checkpoint(repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        video=ROUNDED,
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib={"transformer": 2.6, "text_encoder": TEXT_GIB, "vae": VAE_GIB},
        activations_gib=6.0,
        licence="Apache-2.0",
        preview=EULER_3,
    ),
    ModelSpec(
        id="wan21_14b",
        family="wan",
        title="Wan 2.1 14B",
        pipeline="WanPipeline",
        checkpoint=Checkpoint(repo="Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        video=ROUNDED,
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=T2V_14B_GIB,
        activations_gib=8.0,
        licence="Apache-2.0",
        preview=EULER_3,
    ),
    ModelSpec(
        id="wan21_i2v_14b",
        family="wan",
        title="Wan 2.1 14B image to video, 720p",
        pipeline="WanImageToVideoPipeline",
        checkpoint=I2V_720P,
        parts={
            "image_processor": Part(class_name=CLIP_PROCESSOR, checkpoint=I2V_720P, folder="image_processor")
        },
        arguments=wan.image_arguments,
        control_images=ControlImages(least=1, most=1),
        video=ROUNDED,
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=I2V_14B_GIB,
        activations_gib=8.0,
        licence="Apache-2.0",
        preview=EULER_3_FROM_IMAGE,
    ),
    ModelSpec(
        id="wan21_i2v_14b480p",
        family="wan",
        title="Wan 2.1 14B image to video, 480p",
        pipeline="WanImageToVideoPipeline",
        checkpoint=I2V_480P,
        parts={
            "image_processor": Part(class_name=CLIP_PROCESSOR, checkpoint=I2V_480P, folder="image_processor")
        },
        arguments=wan.image_arguments,
        control_images=ControlImages(least=1, most=1),
        video=ROUNDED,
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=I2V_14B_GIB,
        activations_gib=8.0,
        licence="Apache-2.0",
        preview=EULER_3_FROM_IMAGE,
    ),
    ModelSpec(
        id="wan22_14b_t2v",
        family="wan",
        title="Wan 2.2 14B text to video",
        pipeline="WanPipeline",
        checkpoint=Checkpoint(repo="Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        parts={
            "transformer": Part(class_name=TRANSFORMER, checkpoint=T2V_EXPERTS, folder="transformer"),
            "transformer_2": Part(class_name=TRANSFORMER, checkpoint=T2V_EXPERTS, folder="transformer_2"),
        },
        experts=EXPERTS,
        video=ROUNDED,
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=MOE_14B_GIB,
        activations_gib=8.0,
        licence="Apache-2.0",
        preview=Preview(
            differs="It uses Euler steps with shift 5 instead of UniPC with shift 3. Sizes are multiples"
            " of 16.",
            fields={"scheduler": EULER_SHIFT_5, "divisor": 16},
        ),
    ),
    ModelSpec(
        id="wan22_14b_i2v",
        family="wan",
        title="Wan 2.2 14B image to video",
        pipeline="WanImageToVideoPipeline",
        checkpoint=I2V_EXPERTS,
        assembled=True,
        parts={
            "transformer": Part(class_name=TRANSFORMER, checkpoint=I2V_EXPERTS, folder="transformer"),
            "transformer_2": Part(class_name=TRANSFORMER, checkpoint=I2V_EXPERTS, folder="transformer_2"),
            "vae": Part(
                class_name="diffusers.AutoencoderKLWan", checkpoint=Checkpoint(repo="ai-toolkit/wan2.1-vae")
            ),
            "text_encoder": Part(
                class_name="transformers.UMT5EncoderModel", checkpoint=UMT5, folder="text_encoder"
            ),
            "tokenizer": Part(class_name="transformers.T5TokenizerFast", checkpoint=UMT5, folder="tokenizer"),
        },
        load_options={"boundary_ratio": 0.9},
        scheduler=UNIPC_SHIFT_3,
        experts=EXPERTS,
        arguments=wan.image_arguments,
        during=wan.rounded_start,
        control_images=ControlImages(least=1, most=1),
        video=FLOORED,
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=MOE_14B_GIB,
        activations_gib=8.0,
        licence="Apache-2.0",
        preview=Preview(
            differs="It uses Euler steps with shift 5 instead of UniPC with shift 3. The low-noise"
            " transformer starts at 0.875 instead of 0.9.",
            fields={"scheduler": EULER_SHIFT_5, "during": wan.trainer_boundary},
        ),
    ),
    ModelSpec(
        id="wan22_5b",
        family="wan",
        title="Wan 2.2 5B",
        pipeline="WanPipeline",
        image_pipeline="WanImageToVideoPipeline",
        checkpoint=Checkpoint(repo="Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        scheduler=UNIPC_SHIFT_5,
        arguments=wan.image_arguments,
        control_images=ControlImages(most=1, choose=only_one),
        video=FLOORED,
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib={"transformer": 9.3, "text_encoder": TEXT_GIB, "vae": 1.3},
        activations_gib=6.0,
        licence="Apache-2.0",
        preview=Preview(
            differs="It uses Euler steps instead of UniPC.",
            fields={"scheduler": EULER_SHIFT_5, "during": wan.rounded_start},
        ),
    ),
)
