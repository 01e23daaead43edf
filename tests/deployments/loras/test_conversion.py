"""Files in a model's original naming give the picture of the same weights in diffusers' naming."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deployments.loras.references import open_lora
from tests.studio import Studio, largest_difference

Get = Callable[[str], Studio]


def pictures_are_equal(
    studio: Studio, folder: Path, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> None:
    plain = studio.render({})
    made = []
    for name, tensors in (("one.safetensors", one), ("other.safetensors", other)):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
        assert studio.engine.use([(open_lora(folder, name), 0.8)]) == []
        made.append(studio.picture())
    assert largest_difference(*made) <= 1
    assert largest_difference(made[0], plain) > 5


def original_unet(name: str) -> str:
    """Rename a block of the tiny SDXL (one layer per block) to its original name, as sd-scripts has it."""
    name = re.sub(
        r"down_blocks_(\d)_attentions_(\d)", lambda m: f"input_blocks_{2 * int(m[1]) + int(m[2]) + 1}_1", name
    )
    name = re.sub(
        r"up_blocks_(\d)_attentions_(\d)", lambda m: f"output_blocks_{2 * int(m[1]) + int(m[2])}_1", name
    )
    return name.replace("mid_block_attentions_0", "middle_block_1")


def test_kohya_sdxl_with_text_encoders(studio: Get, tmp_path: Path) -> None:
    used = studio("sdxl")
    unet = load_file(used.loras / "style_a.safetensors")
    text = {
        name: tensor
        for name, tensor in load_file(used.loras / "style_b.safetensors").items()
        if "_te" in name
    }
    for name in [name for name in unet if name.endswith(".alpha")]:
        unet[name] = torch.tensor(1.5)
    renamed = {original_unet(name): tensor for name, tensor in unet.items()}
    assert not set(renamed) & set(unet)
    pictures_are_equal(used, tmp_path, unet | text, renamed | text)


def test_kohya_flux_with_one_matrix_for_query_key_and_value(studio: Get, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, original = {}, {}
    for block in (0, 1):
        down = torch.randn(4, 32, generator=generator) / 6
        ups = {name: torch.randn(32, 4, generator=generator) / 2 for name in ("to_q", "to_k", "to_v")}
        for name, up in ups.items():
            stem = f"transformer.transformer_blocks.{block}.attn.{name}"
            ours |= {
                f"{stem}.lora_A.weight": down,
                f"{stem}.lora_B.weight": up,
                f"{stem}.alpha": torch.tensor(2.0),
            }
        stem = f"lora_unet_double_blocks_{block}_img_attn_qkv"
        original |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": torch.cat(list(ups.values())),
        }
        original[f"{stem}.alpha"] = torch.tensor(2.0)
    pictures_are_equal(studio("flux"), tmp_path, ours, original)


def test_attention_processors_of_older_diffusers(studio: Get, tmp_path: Path) -> None:
    used = studio("sd15")
    kohya = {
        name: tensor
        for name, tensor in load_file(used.loras / "style_a.safetensors").items()
        if "mid_block" in name
    }
    kohya = {name: tensor for name, tensor in kohya.items() if "_to_" in name and not name.endswith("alpha")}
    pattern = re.compile(
        r"lora_unet_mid_block_attentions_0_transformer_blocks_0_(attn\d)_(to_[qkv]|to_out)(?:_0)?\.lora_(\w+)\.weight"
    )
    processors = {
        pattern.sub(
            r"unet.mid_block.attentions.0.transformer_blocks.0.\1.processor.\2_lora.\3.weight", name
        ): tensor
        for name, tensor in kohya.items()
    }
    assert not set(processors) & set(kohya)
    scaled = {
        name: tensor * 20 if "up" in name.split("lora")[-1] else tensor for name, tensor in kohya.items()
    }
    processors = {name: scaled[old] for name, old in zip(processors, kohya, strict=True)}
    pictures_are_equal(used, tmp_path, scaled, processors)
