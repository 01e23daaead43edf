"""Writes `layouts.json`: layer shapes of the real models, built from their configurations without weights.

Run it after a change here:

    python -m deployments.loras.adapters.architectures > deployments/loras/format/layouts.json

A configuration here lists only what determines names and shapes of layers; the rest is the class's default.
The text encoders are CLIP and T5, the only ones that LoRA files are made for.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deployments.loras.adapters.layer_deltas import Layer
from deployments.loras.format.layer_names import Shape


@dataclass(frozen=True, slots=True)
class Model:
    """The dotted name of a model's class, and the model's configuration."""

    class_name: str
    config: Mapping[str, Any]


_CLIP_L = Model(
    "transformers.CLIPTextModel",
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
)
_CLIP_G = Model(
    "transformers.CLIPTextModelWithProjection",
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
)
_T5_XXL = Model(
    "transformers.T5EncoderModel",
    {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    },
)
_UNET_SDXL = Model(
    "diffusers.UNet2DConditionModel",
    {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)


def _transformer(name: str, **config: Any) -> Model:  # noqa: ANN401 - any JSON
    return Model(f"diffusers.{name}Transformer2DModel", config)


def _wan(**config: int) -> Model:
    return Model("diffusers.WanTransformer3DModel", config)


def _ltx(**config: object) -> Model:
    return Model("diffusers.LTX2VideoTransformer3DModel", config)


def _ltx_connectors(**config: object) -> Model:
    return Model("diffusers.pipelines.ltx2.LTX2TextConnectors", config)


ARCHITECTURES: Mapping[tuple[str, ...], Mapping[str, Model]] = {
    ("flux", "flux_kontext"): {
        "transformer": _transformer("Flux", guidance_embeds=True),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
    },
    ("flex1",): {
        "transformer": _transformer("Flux", guidance_embeds=True, num_layers=8),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
    },
    ("flex2",): {
        "transformer": _transformer(
            "Flux", guidance_embeds=True, num_layers=8, in_channels=196, out_channels=64
        ),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
    },
    ("chroma",): {"transformer": _transformer("Chroma"), "text_encoder": _T5_XXL},
    ("flux2", "flux2_diffusers"): {"transformer": _transformer("Flux2")},
    ("flux2_klein_4b",): {
        "transformer": _transformer(
            "Flux2",
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        )
    },
    ("flux2_klein_9b",): {
        "transformer": _transformer(
            "Flux2",
            num_layers=8,
            num_single_layers=24,
            num_attention_heads=32,
            joint_attention_dim=12288,
            guidance_embeds=False,
        )
    },
    ("sd15",): {
        "unet": Model("diffusers.UNet2DConditionModel", {"cross_attention_dim": 768}),
        "text_encoder": _CLIP_L,
    },
    ("sdxl",): {"unet": _UNET_SDXL, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
    ("zimage", "zimage_turbo", "zimage_deturbo"): {"transformer": _transformer("ZImage")},
    (
        "qwen_image",
        "qwen_image_2512",
        "qwen_image_edit",
        "qwen_image_edit_plus",
        "qwen_image_edit_plus_2511",
    ): {"transformer": _transformer("QwenImage")},
    ("lumina2",): {"transformer": _transformer("Lumina2", cap_feat_dim=2304)},
    ("krea2", "krea2_turbo", "krea2_o_edit", "krea2_o_edit_turbo"): {"transformer": _transformer("Krea2")},
    ("hidream", "hidream_e1"): {
        "transformer": _transformer(
            "HiDreamImage",
            patch_size=2,
            in_channels=16,
            out_channels=16,
            caption_channels=[4096, 4096],
            llama_layers=[*range(32), *[31] * 16],
        )
    },
    ("hidream_o1",): {
        "transformer": Model(
            "deployments.pipelines.hidream_o1.PixelTransformer",
            {
                "text_config": {
                    "hidden_size": 4096,
                    "intermediate_size": 12288,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                }
            },
        )
    },
    ("omnigen2",): {
        "transformer": Model("deployments.pipelines.omnigen2_transformer.OmniGen2Transformer2DModel", {})
    },
    ("wan21_1b",): {"transformer": _wan(num_attention_heads=12, num_layers=30, ffn_dim=8960)},
    ("wan21_14b", "wan22_14b_t2v"): {"transformer": _wan()},
    ("wan21_i2v_14b", "wan21_i2v_14b480p"): {
        "transformer": _wan(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
    },
    ("wan22_14b_i2v",): {"transformer": _wan(in_channels=36)},
    ("wan22_5b",): {
        "transformer": _wan(
            num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48
        )
    },
    ("ltx2",): {"transformer": _ltx(), "connectors": _ltx_connectors()},
    ("ltx2.3",): {
        "transformer": _ltx(
            gated_attn=True,
            cross_attn_mod=True,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
            use_prompt_embeddings=False,
            perturbed_attn=True,
        ),
        "connectors": _ltx_connectors(
            video_connector_num_attention_heads=32,
            video_connector_num_layers=8,
            video_gated_attn=True,
            audio_connector_num_attention_heads=32,
            audio_connector_attention_head_dim=64,
            audio_connector_num_layers=8,
            audio_gated_attn=True,
            per_modality_projections=True,
            proj_bias=True,
        ),
    },
    ("minimax_h3",): {"transformer": Model("diffusers.MiniMaxH3Transformer3DModel", {})},
}
"""The components that LoRA files change, by the ids that share them. Equal transformers are listed once."""


def shapes_of(model: Model) -> dict[str, Shape]:
    """Build a model without memory. Return the weight shapes of its linear and convolution layers by path."""
    module, _, class_name = model.class_name.rpartition(".")
    model_class = getattr(importlib.import_module(module), class_name)
    with torch.device("meta"):
        if issubclass(model_class, PreTrainedModel):
            config_class: Any = model_class.config_class
            built = model_class(config_class(**model.config))
        else:
            built = model_class(**model.config)
    layers = {path: layer for path, layer in built.named_modules() if isinstance(layer, Layer)}
    return {path: tuple(layer.weight.shape) for path, layer in layers.items()}


def render() -> str:
    """Return the text of `layouts.json`."""
    entries = []
    for models, parts in ARCHITECTURES.items():
        components = ",\n".join(_component(name, model) for name, model in parts.items())
        entries.append(f'{{"models": {json.dumps(models)}, "components": {{\n{components}\n}}}}')
    return "[\n" + ",\n".join(entries) + "\n]\n"


def _component(name: str, model: Model) -> str:
    layers = sorted(_fold(shapes_of(model)).items())
    lines = ",\n".join(f"  {json.dumps(path)}: {list(shape)}" for path, shape in layers)
    return f" {json.dumps(name)}: {{\n{lines}\n }}"


def _fold(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Merge equal shapes whose paths differ in one number with every value below N, written `{N}`."""
    folded = dict(shapes)
    for position in range(1 + max(path.count(".") for path in shapes)):
        alike: defaultdict[tuple[str, str, Shape], dict[str, str]] = defaultdict(dict)
        for path, shape in folded.items():
            segments = path.split(".")
            if position < len(segments) and segments[position].isdecimal():
                before, after = segments[:position], segments[position + 1 :]
                alike[".".join(before), ".".join(after), shape][segments[position]] = path
        for (before, after, shape), paths in alike.items():
            if len(paths) > 1 and set(paths) == set(map(str, range(len(paths)))):
                for path in paths.values():
                    del folded[path]
                folded[f"{before}.{{{len(paths)}}}.{after}".strip(".")] = shape
    return folded


if __name__ == "__main__":
    sys.stdout.write(render())
