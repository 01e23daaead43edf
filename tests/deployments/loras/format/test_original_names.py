"""Files in a model's original naming give the same picture as the same weights in diffusers' naming."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.loras.adapters.architectures import Model, shapes_of
from deployments.loras.format.file_modules import judge
from deployments.loras.format.header import read_header
from deployments.loras.format.layer_names import Targets
from deployments.loras.sources.lora_root import open_lora
from tests.support.studio import Studio, largest_difference

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
    """Rename a block of the tiny SDXL (one layer per block) to its original name, as sd-scripts writes it."""
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


@pytest.mark.parametrize("model", ["flux", "chroma", "flux2_klein_4b"])
@pytest.mark.parametrize("dialect", ["kohya", "trainer"])
def test_one_matrix_for_query_key_and_value(studio: Get, tmp_path: Path, model: str, dialect: str) -> None:
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
        if dialect == "kohya":
            stem, names = f"lora_unet_double_blocks_{block}_img_attn_qkv", ("lora_down", "lora_up")
        else:
            stem, names = f"diffusion_model.double_blocks.{block}.img_attn.qkv", ("lora_A", "lora_B")
        for name, matrix in zip(names, (down, torch.cat(list(ups.values()))), strict=True):
            original[f"{stem}.{name}.weight"] = matrix
        original[f"{stem}.alpha"] = torch.tensor(2.0)
    pictures_are_equal(studio(model), tmp_path, ours, original)


QKV = ("transformer_blocks.0.attn.", ("to_q", "to_k", "to_v"), "double_blocks.0.img_attn.qkv", 96)
LINEAR1 = (
    "single_transformer_blocks.1.",
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "single_blocks.1.linear1",
    224,
)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lycoris_"])
@pytest.mark.parametrize(
    ("model", "fused"),
    [("flux", QKV), ("flux", LINEAR1), ("chroma", QKV), ("chroma", LINEAR1), ("flux2_klein_4b", QKV)],
)
def test_lokr_over_a_fused_projection(
    studio: Get, tmp_path: Path, model: str, fused: tuple[str, tuple[str, ...], str, int], prefix: str
) -> None:
    """The factors' blocks do not align with the layers: w2 has 24 or 56 rows, a layer has 32."""
    parent, names, stem, outputs = fused
    if prefix == "lycoris_":
        stem = stem.replace(".", "_")
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(4, 4, generator=generator) / 2
    w2 = torch.randn(outputs // 4, 8, generator=generator) / 4
    original = {f"{prefix}{stem}.lokr_{name}": factor for name, factor in (("w1", w1), ("w2", w2))}
    original[f"{prefix}{stem}.alpha"] = torch.tensor(1e10)
    ours = {}
    for name, rows in zip(names, torch.kron(w1, w2).split([32, 32, 32, 128][: len(names)]), strict=True):
        ours[f"transformer.{parent}{name}.lora_A.weight"] = rows
        ours[f"transformer.{parent}{name}.lora_B.weight"] = torch.eye(rows.shape[0])
    # A rank above the layer's inputs is useless, but exact.
    pictures_are_equal(studio(model), tmp_path, ours, original)


def test_kohya_flux_beyond_its_blocks(studio: Get, tmp_path: Path) -> None:
    """The layers around the blocks; diffusers swaps the halves of the last one."""
    generator = torch.Generator().manual_seed(0)

    def pair(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.randn(4, inputs, generator=generator) / inputs**0.5
        return down, torch.randn(outputs, 4, generator=generator)

    ours, original = {}, {}
    for path, name, sizes in (
        ("transformer_blocks.0.norm1.linear", "double_blocks_0_img_mod_lin", (32, 192)),
        ("x_embedder", "img_in", (64, 32)),
        ("norm_out.linear", "final_layer_adaLN_modulation_1", (32, 64)),
    ):
        down, up = pair(*sizes)
        original |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
        swapped = torch.cat(up.chunk(2)[::-1]) if path == "norm_out.linear" else up
        ours |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": swapped}
    pictures_are_equal(studio("flux"), tmp_path, ours, original)


def test_the_layer_that_guides_chroma(studio: Get, tmp_path: Path) -> None:
    """A LoRA of all layers includes the guidance layer."""
    used, generator = studio("chroma"), torch.Generator().manual_seed(0)
    ours, original = {}, {}
    for path, name in (("linear_1", "in_layer"), ("linear_2", "out_layer")):
        stem = "distilled_guidance_layer.layers.0."
        layer = used.engine._pipeline.transformer.get_submodule(stem + path)
        down = torch.randn(4, layer.in_features, generator=generator) / layer.in_features**0.5
        pair = {
            "lora_A.weight": down,
            "lora_B.weight": torch.randn(layer.out_features, 4, generator=generator),
        }
        ours |= {f"transformer.{stem}{path}.{matrix}": tensor for matrix, tensor in pair.items()}
        original |= {f"diffusion_model.{stem}{name}.{matrix}": tensor for matrix, tensor in pair.items()}
    pictures_are_equal(used, tmp_path, ours, original)


def test_lokr_of_shift_and_scale(studio: Get, tmp_path: Path) -> None:
    """diffusers swaps the last layer's output halves, so the rows of a LoKr are swapped."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(4, 4, generator=generator), torch.randn(16, 8, generator=generator)
    stem = "diffusion_model.final_layer.adaLN_modulation.1"
    whole = torch.cat(torch.kron(w1, w2).chunk(2)[::-1])
    ours = {
        "transformer.norm_out.linear.lora_A.weight": whole,
        "transformer.norm_out.linear.lora_B.weight": torch.eye(64),
    }
    pictures_are_equal(studio("flux"), tmp_path, ours, {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2})


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


def test_wan_by_its_original_names() -> None:
    config = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ffn_dim": 32,
        "text_dim": 16,
    }
    model = Model("diffusers.WanTransformer3DModel", {**config, "image_dim": 16, "added_kv_proj_dim": 16})
    shapes = shapes_of(model)
    targets = Targets({"transformer": shapes})
    attention = {f"self_attn.{name}" for name in "qkvo"} | {
        f"cross_attn.{name}" for name in ("q", "k", "v", "o", "k_img", "v_img")
    }
    names = {f"blocks.{block}.{name}" for block in range(2) for name in (*attention, "ffn.0", "ffn.2")}
    names |= {"time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"}
    names |= {"text_embedding.0", "text_embedding.2", "img_emb.proj.1", "img_emb.proj.3"}
    for prefix, flat in (("diffusion_model.", False), ("lora_unet_", True)):
        stems = [prefix + (name.replace(".", "_") if flat else name) for name in sorted(names)]
        assert {path for stem in stems for path in targets.find(stem).layers} == set(shapes)


def test_minimax_h3_by_its_original_names(studio: Get, tmp_path: Path) -> None:
    """One matrix makes query, key and value; gate and value are in reverse order."""
    used = studio("minimax_h3")
    trainers = {
        name: tensor
        for name, tensor in load_file(used.loras / used.names[0]).items()
        if "adaln_proj" not in name
    }
    ours = {}
    for name, tensor in trainers.items():
        stem, _, matrix = name.removeprefix("diffusion_model.").rpartition(".lora_")
        stem = stem.replace("token_refiner.blocks", "token_refiner.refiner_blocks")
        stem = re.sub(r"^blocks", "transformer_blocks", stem)
        up = matrix.startswith("B")
        if stem.endswith("attn.qkv_proj"):
            parts = tensor.chunk(3) if up else (tensor,) * 3
            paths = ("attn.to_q", "attn.to_k", "attn.to_v")
        else:
            parts = (torch.cat(tensor.chunk(2)[::-1]) if up and stem.endswith("fc1") else tensor,)
            path = {"attn.out_proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
            paths = (path[".".join(stem.split(".")[-2:])],)
        for part, path in zip(parts, paths, strict=True):
            ours[f"transformer.{'.'.join(stem.split('.')[:-2])}.{path}.lora_{matrix}"] = part
    pictures_are_equal(used, tmp_path, ours, trainers)


def test_a_plain_alpha_in_the_metadata_counts_for_minimax_h3_alone(studio: Get, tmp_path: Path) -> None:
    used = studio("minimax_h3")
    tensors = load_file(used.loras / used.names[0])
    rank = tensors["diffusion_model.blocks.0.mlp.fc1.lora_A.weight"].shape[0]
    doubled = {name: 2 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "turbo.safetensors", {"alpha": str(2 * rank)})
    used.engine.use([(open_lora(tmp_path, "turbo.safetensors"), 1.0)])
    turbo = used.picture()
    save_file(doubled, tmp_path / "doubled.safetensors", {"alpha": "many"})
    used.engine.use([(open_lora(tmp_path, "doubled.safetensors"), 1.0)])
    assert np.array_equal(used.picture(), turbo)
    flux = {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(4, 2)}
    save_file(flux, tmp_path / "flux.safetensors", {"alpha": "9"})
    assert judge(read_header(tmp_path / "flux.safetensors")).modules["transformer.x"].scale is None


def test_adaln_of_minimax_h3_has_no_effect_and_no_warning(studio: Get, tmp_path: Path) -> None:
    """This holds for any number of inputs: files that were trained on the pruned model have 8."""
    used = studio("minimax_h3")
    whole = load_file(used.loras / used.names[0])
    assert any("adaln_proj" in name for name in whole)
    without = {name: tensor for name, tensor in whole.items() if "adaln_proj" not in name}
    pictures_are_equal(used, tmp_path, whole, without)
