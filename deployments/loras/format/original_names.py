"""The original code's names for layers that diffusers renamed or split.

The trainer writes FLUX.2, Chroma and Krea 2 files with these names. So do kohya, LyCORIS, XLabs and ComfyUI.
Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."

_QKV = ("to_q", "to_k", "to_v")

_EMBEDDERS = (
    ("time_in.in_layer", "timestep_embedder.linear_1"),
    ("time_in.out_layer", "timestep_embedder.linear_2"),
    ("vector_in.in_layer", "text_embedder.linear_1"),
    ("vector_in.out_layer", "text_embedder.linear_2"),
    ("guidance_in.in_layer", "guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "guidance_embedder.linear_2"),
)

_Names: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""Pairs of an original name and its layers in diffusers, as `ORIGINAL_NAMES` describes them."""

_FLUX: _Names = (
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
    *((name, ("time_text_embed." + path,)) for name, path in _EMBEDDERS),
    # FLUX.1 by XLabs
    (
        "double_blocks.{}.qkv_lora1",
        (_DOUBLE + "attn.to_q", _DOUBLE + "attn.to_k", _DOUBLE + "attn.to_v"),
    ),
    (
        "double_blocks.{}.qkv_lora2",
        (_DOUBLE + "attn.add_q_proj", _DOUBLE + "attn.add_k_proj", _DOUBLE + "attn.add_v_proj"),
    ),
    ("double_blocks.{}.proj_lora1", (_DOUBLE + "attn.to_out.0",)),
    ("double_blocks.{}.proj_lora2", (_DOUBLE + "attn.to_add_out",)),
    # FLUX.1, FLUX.2 and Chroma
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    # Chroma
    *(
        (f"distilled_guidance_layer.layers.{{}}.{name}", (f"distilled_guidance_layer.layers.{{}}.{path}",))
        for name, path in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    ),
    # FLUX.2
    *((name, ("time_guidance_embed." + path,)) for name, path in _EMBEDDERS),
    *(
        (f"{name}.lin", (f"{name}.linear",))
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ),
    ("double_blocks.{}.img_mlp.0", (_DOUBLE + "ff.linear_in",)),
    ("double_blocks.{}.img_mlp.2", (_DOUBLE + "ff.linear_out",)),
    ("double_blocks.{}.txt_mlp.0", (_DOUBLE + "ff_context.linear_in",)),
    ("double_blocks.{}.txt_mlp.2", (_DOUBLE + "ff_context.linear_out",)),
    ("single_blocks.{}.linear1", (_SINGLE + "attn.to_qkv_mlp_proj",)),
    ("single_blocks.{}.linear2", (_SINGLE + "attn.to_out",)),
)

_Z_IMAGE_AND_LUMINA: _Names = (
    *(
        (f"{stage}.{{}}.{name}", tuple(f"{stage}.{{}}.{path}" for path in paths))
        for stage in ("layers", "noise_refiner", "context_refiner")
        for name, paths in (
            ("attention.qkv", tuple(f"attention.{name}" for name in _QKV)),
            ("attention.out", ("attention.to_out.0",)),
            ("attention.qkv", tuple(f"attn.{name}" for name in _QKV)),
            ("attention.out", ("attn.to_out.0",)),
            ("feed_forward.w1", ("feed_forward.linear_1",)),
            ("feed_forward.w2", ("feed_forward.linear_2",)),
            ("feed_forward.w3", ("feed_forward.linear_3",)),
            ("adaLN_modulation.1", ("norm1.linear",)),
        )
    ),
)

_WAN: _Names = (
    *(
        (f"blocks.{{}}.{original}.{name}", (f"blocks.{{}}.{renamed}.{path}",))
        for original, renamed in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, path in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("k_img", "add_k_proj"),
            ("v_img", "add_v_proj"),
        )
    ),
    ("blocks.{}.ffn.0", ("blocks.{}.ffn.net.0.proj",)),
    ("blocks.{}.ffn.2", ("blocks.{}.ffn.net.2",)),
    ("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
    ("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
    ("time_projection.1", ("condition_embedder.time_proj",)),
    ("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
    ("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
    ("img_emb.proj.1", ("condition_embedder.image_embedder.ff.net.0.proj",)),
    ("img_emb.proj.3", ("condition_embedder.image_embedder.ff.net.2",)),
    ("head.head", ("proj_out",)),
)

_STABLE_DIFFUSION: _Names = (
    ("input_blocks.0.0", ("conv_in",)),
    ("out.2", ("conv_out",)),
    ("time_embed.0", ("time_embedding.linear_1",)),
    ("time_embed.2", ("time_embedding.linear_2",)),
    ("label_emb.0.0", ("add_embedding.linear_1",)),
    ("label_emb.0.2", ("add_embedding.linear_2",)),
)

_KREA_2: _Names = (
    ("first", ("img_in",)),
    ("last.linear", ("final_layer.linear",)),
    ("tmlp.0", ("time_embed.linear_1",)),
    ("tmlp.2", ("time_embed.linear_2",)),
    ("tproj.1", ("time_mod_proj",)),
    ("txtmlp.1", ("txt_in.linear_1",)),
    ("txtmlp.3", ("txt_in.linear_2",)),
    ("txtfusion.projector", ("text_fusion.projector",)),
    *(
        (f"{original}.{{}}.{name}", (f"{renamed}.{{}}.{path}",))
        for original, renamed in (
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

_LTX_2: _Names = (
    ("patchify_proj", ("proj_in",)),
    ("audio_patchify_proj", ("audio_proj_in",)),
    *(
        (f"{original}.{path}", (f"{renamed}.{path}",))
        for original, renamed in (
            ("adaln_single", "time_embed"),
            ("audio_adaln_single", "audio_time_embed"),
            ("prompt_adaln_single", "prompt_adaln"),
            ("audio_prompt_adaln_single", "audio_prompt_adaln"),
            ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
            ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
            ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
            ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
        )
        for path in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    ),
)

_MINIMAX_H3: _Names = (
    *(
        (f"{original}.{{}}.{name}", tuple(f"{renamed}.{{}}.{path}" for path in paths))
        for original, renamed in (
            ("blocks", "transformer_blocks"),
            ("token_refiner.blocks", "token_refiner.refiner_blocks"),
        )
        for name, paths in (
            ("attn.qkv_proj", tuple(f"attn.{name}" for name in _QKV)),
            ("attn.out_proj", ("attn.to_out.0",)),
            ("mlp.fc1", ("ff.net.0.proj",)),
            ("mlp.fc2", ("ff.net.2",)),
        )
    ),
    ("video_patch_proj", ("proj_in",)),
    ("audio_patch_proj", ("audio_proj_in",)),
    ("condition_proj", ("context_embedder",)),
    ("time_embedder.proj_in", ("time_embedder.linear_1",)),
    ("time_embedder.proj_out", ("time_embedder.linear_2",)),
    ("final_layer.video_out", ("proj_out",)),
    ("final_layer.audio_out", ("audio_proj_out",)),
)

_LTX_2_CONNECTORS: _Names = (
    ("aggregate_embed", ("text_proj_in",)),
    ("video_aggregate_embed", ("video_text_proj_in",)),
    ("audio_aggregate_embed", ("audio_text_proj_in",)),
)

ORIGINAL_NAMES: Mapping[str, _Names] = {
    "single_transformer_blocks.0": _FLUX,
    "layers.0": _Z_IMAGE_AND_LUMINA,
    "condition_embedder": _WAN,
    "conv_in": _STABLE_DIFFUSION,
    "text_fusion": _KREA_2,
    "av_cross_attn_video_scale_shift": _LTX_2,
    "video_connector": _LTX_2_CONNECTORS,
    "token_refiner": _MINIMAX_H3,
}
"""Original names and their layers in diffusers. The key is a submodule that only models of one kind have.

`{}` stands for a block's index. If there are several layers, their outputs side by side are the original
layer's. Names without layers in a model are skipped.
"""

SWAPPED = re.compile(r"final_layer[._]adaLN_modulation[._]1|(token_refiner[._])?blocks[._]\d+[._]mlp[._]fc1")
"""Original names of layers whose two output halves are in the opposite order in diffusers.

In FLUX.1, FLUX.2 and Chroma the halves are shift and scale, in MiniMax-H3 gate and value.
"""

WITHOUT_EFFECT: Mapping[str, re.Pattern[str]] = {
    "token_refiner": re.compile(r"(.*[._])?(adaln_proj([._]linear)?|norm_out[._]linear)"),
}
"""Layers whose LoRA has no effect because the original code bypasses it. The keys are as above."""

_UNET_BLOCK = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_names(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the original name and the diffusers path of each layer in a Stable Diffusion UNet's blocks.

    The original code numbers all input blocks in one sequence, and all output blocks in another. On the input
    side each level has its resnets and then a downsampler. On the output side each level has one resnet more,
    and its upsampler is inside the last block.
    """
    blocks = [(match, path) for path in paths if (match := _UNET_BLOCK.fullmatch(path))]
    firsts = {match[4] for match, _ in blocks if match.expand(r"\1 \2 \3") == "down 0 resnets"}
    stride = len(firsts) + 1
    with_attention = {(match[1], match[2]) for match, _ in blocks if match[3] == "attentions"}
    for match, path in blocks:
        side, level, kind, index, rest = match.groups()
        first, position = stride * int(level or 0), int(index)
        if kind == "resnets":
            rest = _RESNET.get(rest, rest)
        if side == "mid":
            yield f"middle_block.{1 if kind == 'attentions' else 2 * position}.{rest}", path
        elif kind == "downsamplers":
            yield f"input_blocks.{first + stride}.0.op", path
        elif kind == "upsamplers":
            inner = 2 if (side, level) in with_attention else 1
            yield f"output_blocks.{first + stride - 1}.{inner}.{rest}", path
        else:
            block = (
                f"input_blocks.{first + position + 1}"
                if side == "down"
                else f"output_blocks.{first + position}"
            )
            yield f"{block}.{int(kind == 'attentions')}.{rest}", path
