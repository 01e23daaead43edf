"""HiDream."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from deployments.catalog.control_choices import first
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Part, Preview

if TYPE_CHECKING:
    from deployments.pipelines import hidream, hidream_e1, hidream_o1
else:
    hidream = LazyModule("deployments.pipelines.hidream")
    hidream_e1 = LazyModule("deployments.pipelines.hidream_e1")
    hidream_o1 = LazyModule("deployments.pipelines.hidream_o1")

LLAMA = Checkpoint(repo="unsloth/Meta-Llama-3.1-8B-Instruct")

O1 = Checkpoint(repo="HiDream-ai/HiDream-O1-Image")

LLAMA_PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "text_encoder_4": Part(class_name="transformers.LlamaForCausalLM", checkpoint=LLAMA),
        "tokenizer_4": Part(class_name="transformers.PreTrainedTokenizerFast", checkpoint=LLAMA),
    }
)
"""The fourth text encoder."""

HIDREAM_GIB: Mapping[str, float] = MappingProxyType(
    {
        "transformer": 31.9,
        "text_encoder_4": 15.0,
        "text_encoder_3": 8.9,
        "text_encoder_2": 1.3,
        "text_encoder": 0.2,
        "vae": 0.2,
    }
)

ROWS = (
    ModelSpec(
        id="hidream",
        family="hidream",
        title="HiDream-I1 Full",
        pipeline="HiDreamImagePipeline",
        checkpoint=Checkpoint(repo="HiDream-ai/HiDream-I1-Full"),
        parts=LLAMA_PARTS,
        adjust=hidream.complete,
        call_options={"max_sequence_length": 128},
        steps=50,
        guidance=5.0,
        divisor=16,
        products_in_file_dtype=True,
        memory_gib=HIDREAM_GIB,
        licence="MIT",
        preview=Preview(
            differs="Sizes are multiples of 8 before they are scaled to one megapixel. In bfloat16, Llama's"
            " rotary frequencies are rounded.",
            fields={"divisor": 8, "during": hidream.rounded_frequencies, "products_in_file_dtype": False},
        ),
    ),
    ModelSpec(
        id="hidream_e1",
        family="hidream",
        title="HiDream-E1 Full",
        pipeline=hidream_e1.HiDreamEditPipeline,
        checkpoint=Checkpoint(repo="HiDream-ai/HiDream-E1-Full"),
        parts=LLAMA_PARTS,
        adjust=hidream.complete_edit,
        arguments=hidream.edit_arguments,
        call_options={"max_sequence_length": 128, "image_guidance_scale": 4.0},
        control_images=ControlImages(least=1, most=1),
        steps=28,
        guidance=5.0,
        divisor=16,
        products_in_file_dtype=True,
        memory_gib=HIDREAM_GIB,
        licence="MIT",
        preview=Preview(
            differs="Image guidance is 2. The control image is resized to multiples of 8, then to multiples"
            " of 16. In bfloat16, Llama's rotary frequencies are rounded.",
            fields={
                "divisor": 8,
                "call_options": {"max_sequence_length": 128, "image_guidance_scale": 2.0},
                "control_images": ControlImages(least=1, most=1, choose=first),
                "during": hidream.rounded_frequencies,
                "products_in_file_dtype": False,
            },
        ),
    ),
    ModelSpec(
        id="hidream_o1",
        family="hidream",
        title="HiDream-O1-Image",
        pipeline=hidream_o1.HiDreamO1Pipeline,
        checkpoint=O1,
        parts={
            "transformer": Part(class_name=hidream_o1.PixelTransformer, checkpoint=O1),
            "tokenizer": Part(class_name="transformers.Qwen2Tokenizer", checkpoint=O1),
        },
        assembled=True,
        scheduler=("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
        steps=50,
        guidance=5.0,
        width=2048,
        height=2048,
        divisor=32,
        memory_gib={"transformer": 14.2},
        licence="MIT",
    ),
)
