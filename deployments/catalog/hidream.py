"""HiDream."""

from __future__ import annotations

from deployments.catalog.spec import Checkpoint, ModelSpec, Part, Preview

LLAMA = Checkpoint(repo="unsloth/Meta-Llama-3.1-8B-Instruct")
"""HiDream's fourth text encoder."""

ROWS = (
    ModelSpec(
        id="hidream",
        family="hidream",
        title="HiDream-I1 Full",
        pipeline="HiDreamImagePipeline",
        checkpoint=Checkpoint(repo="HiDream-ai/HiDream-I1-Full"),
        parts={
            "text_encoder_4": Part(class_name="transformers.LlamaForCausalLM", checkpoint=LLAMA),
            "tokenizer_4": Part(class_name="transformers.PreTrainedTokenizerFast", checkpoint=LLAMA),
        },
        adjust="complete",
        call_options={"max_sequence_length": 128},
        steps=50,
        guidance=5.0,
        divisor=16,
        memory_gib={
            "transformer": 31.9,
            "text_encoder_4": 15.0,
            "text_encoder_3": 8.9,
            "text_encoder_2": 1.3,
            "text_encoder": 0.2,
            "vae": 0.2,
        },
        licence="MIT",
        preview=Preview(
            differs="Sizes are multiples of 8 before they are scaled to one megapixel; in bfloat16, Llama's"
            " rotary frequencies are rounded.",
            fields={"divisor": 8, "during": "rounded_frequencies"},
        ),
    ),
)
