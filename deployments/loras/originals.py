"""The original code's names of layers that diffusers renamed or split: FLUX.1, FLUX.2, Chroma and Krea 2.

The trainer writes FLUX.2, Chroma and Krea 2 files in these names; kohya's and LyCORIS' files have them too.
"""

from __future__ import annotations

_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."

ORIGINAL_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "double_blocks.{}.img_attn.qkv",
        (_DOUBLE + "attn.to_q", _DOUBLE + "attn.to_k", _DOUBLE + "attn.to_v"),
    ),
    (
        "double_blocks.{}.txt_attn.qkv",
        (_DOUBLE + "attn.add_q_proj", _DOUBLE + "attn.add_k_proj", _DOUBLE + "attn.add_v_proj"),
    ),
    ("double_blocks.{}.img_attn.proj", (_DOUBLE + "attn.to_out.0",)),
    ("double_blocks.{}.txt_attn.proj", (_DOUBLE + "attn.to_add_out",)),
    # FLUX.1 and Chroma
    ("double_blocks.{}.img_mlp.0", (_DOUBLE + "ff.net.0.proj",)),
    ("double_blocks.{}.img_mlp.2", (_DOUBLE + "ff.net.2",)),
    ("double_blocks.{}.txt_mlp.0", (_DOUBLE + "ff_context.net.0.proj",)),
    ("double_blocks.{}.txt_mlp.2", (_DOUBLE + "ff_context.net.2",)),
    (
        "single_blocks.{}.linear1",
        (_SINGLE + "attn.to_q", _SINGLE + "attn.to_k", _SINGLE + "attn.to_v", _SINGLE + "proj_mlp"),
    ),
    ("single_blocks.{}.linear2", (_SINGLE + "proj_out",)),
    # FLUX.1
    ("double_blocks.{}.img_mod.lin", (_DOUBLE + "norm1.linear",)),
    ("double_blocks.{}.txt_mod.lin", (_DOUBLE + "norm1_context.linear",)),
    ("single_blocks.{}.modulation.lin", (_SINGLE + "norm.linear",)),
    # FLUX.2
    ("double_blocks.{}.img_mlp.0", (_DOUBLE + "ff.linear_in",)),
    ("double_blocks.{}.img_mlp.2", (_DOUBLE + "ff.linear_out",)),
    ("double_blocks.{}.txt_mlp.0", (_DOUBLE + "ff_context.linear_in",)),
    ("double_blocks.{}.txt_mlp.2", (_DOUBLE + "ff_context.linear_out",)),
    ("single_blocks.{}.linear1", (_SINGLE + "attn.to_qkv_mlp_proj",)),
    ("single_blocks.{}.linear2", (_SINGLE + "attn.to_out",)),
    # Krea 2
    *(
        (f"{original}.{{}}.{name}", (f"{ours}.{{}}.{path}",))
        for original, ours in (
            ("blocks", "transformer_blocks"),
            ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
            ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
        )
        for name, path in (
            ("attn.wq", "attn.to_q"),
            ("attn.wk", "attn.to_k"),
            ("attn.wv", "attn.to_v"),
            ("attn.wo", "attn.to_out.0"),
            ("attn.gate", "attn.to_gate"),
            ("mlp.gate", "ff.gate"),
            ("mlp.up", "ff.up"),
            ("mlp.down", "ff.down"),
        )
    ),
)
"""Original name, with the block's index left open, and the layers in diffusers whose outputs make up its own.

What a model has not is passed over: an original name means the layers that are there.
"""
