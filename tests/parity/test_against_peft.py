"""Our adapters against diffusers' own loader and peft: both must give the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from deployments.loras.sources.lora_root import open_lora
from tests.parity.cases import FOLDER, MODELS, each
from tests.support.studio import Studio, largest_difference

pytestmark = pytest.mark.usefixtures("small_canvas")

Get = Callable[[str], Studio]

# diffusers loads nothing from the trainer's files for Chroma, and has neither HiDream-O1 nor OmniGen2; our
# pipeline of MiniMax-H3 is not its own.
UNREAD = ("chroma", "hidream_o1", "omnigen2", "minimax_h3")
READ_BY_DIFFUSERS = [model for model in MODELS if model not in UNREAD]


def picture_by_peft(used: Studio, lora: Path, multiplier: float) -> Any:
    """Render with peft on a separate pipeline, which peft may change permanently."""
    pipeline = used.engine._pipeline
    pipeline.load_lora_weights(load_file(lora), adapter_name="lora")
    pipeline.set_adapters(["lora"], [multiplier])
    return used.picture()


@pytest.fixture
def both(studio: Get, new_studio: Get) -> Callable[[str, Path, float], tuple[Any, Any]]:
    """Render one prompt on `model` with a LoRA file, with our adapters and with peft."""

    def render(model: str, lora: Path, multiplier: float) -> tuple[Any, Any]:
        used = studio(model)
        used.engine.use([(open_lora(lora.parent, lora.name), multiplier)])
        return used.picture(), picture_by_peft(new_studio(model), lora, multiplier)

    return render


@pytest.mark.parametrize("model", each(READ_BY_DIFFUSERS))
@pytest.mark.parametrize("multiplier", [1.0, -0.7])
def test_trainer_files(both: Any, model: str, multiplier: float) -> None:
    for file in sorted((FOLDER / model / "lora").iterdir()):
        ours, peft = both(model, file, multiplier)
        assert largest_difference(ours, peft) <= 1


@pytest.mark.parametrize(
    "stated",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"alpha_pattern": {"model.language_model.layers.0.mlp.up_proj": 12}},
    ],
    ids=str,
)
def test_the_folders_that_peft_writes(
    studio: Get, new_studio: Get, tmp_path: Path, stated: dict[str, Any]
) -> None:
    used, other = studio("hidream_o1"), new_studio("hidream_o1")
    shutil.copytree(used.loras / "peft_a", tmp_path / "folder")
    config = tmp_path / "folder" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **stated}))
    used.engine.use([(open_lora(tmp_path, "folder"), 1.0)])
    ours = used.picture()
    PeftModel.from_pretrained(other.engine._pipeline.transformer, tmp_path / "folder")
    assert largest_difference(ours, other.picture()) <= 1
    assert largest_difference(ours, used.render({"peft_a": 1.0})) > 1


def test_a_file_with_text_encoder_parts_is_more_than_its_unet_part(
    studio: Callable[[str], Studio], tmp_path: Path
) -> None:
    used = studio("sd15")
    whole = load_file(used.loras / "style_b.safetensors")
    save_file({name: whole[name] for name in whole if "lora_te" not in name}, tmp_path / "unet.safetensors")
    with_text = used.render({"style_b.safetensors": 1.0})
    used.engine.use([(open_lora(tmp_path, "unet.safetensors"), 1.0)])
    assert largest_difference(with_text, used.picture()) > 1


def test_lokr_with_whole_and_with_split_factors(both: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    tensors = {}
    for block in (0, 1):
        for name in ("to_q", "to_k", "to_v"):
            stem = f"diffusion_model.layers.{block}.attention.{name}"
            tensors |= {f"{stem}.lokr_w1": factor(4, 4), f"{stem}.lokr_w2": factor(12, 12)}
            tensors[f"{stem}.alpha"] = torch.tensor(9999999999.0)
    save_file(tensors, tmp_path / "whole.safetensors")
    ours, peft = both("zimage", tmp_path / "whole.safetensors", 0.8)
    assert largest_difference(ours, peft) <= 1

    for name in [name for name in tensors if name.endswith("w2")]:
        del tensors[name]
        tensors |= {f"{name}_a": factor(12, 3), f"{name}_b": factor(3, 12)}
        tensors[name.replace("lokr_w2", "alpha")] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "split.safetensors")
    split, peft = both("zimage", tmp_path / "split.safetensors", 0.8)
    assert largest_difference(split, peft) <= 1
    assert largest_difference(split, ours) > 1


@pytest.mark.parametrize(
    ("model", "stem", "path"),
    [
        ("qwen_image", "diffusion_model.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        ("lumina2", "transformer.layers.0.attn.to_q", "layers.0.attn.to_q"),
        ("omnigen2", "diffusion_model.layers.0.norm1.linear", "layers.0.norm1.linear"),
        ("krea2", "diffusion_model.blocks.0.mlp.gate", "transformer_blocks.0.ff.gate"),
        ("wan21_1b", "diffusion_model.blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"),
        ("wan21_i2v_14b", "diffusion_model.blocks.1.cross_attn.k_img", "blocks.1.attn2.add_k_proj"),
        (
            "krea2",
            "diffusion_model.txtfusion.refiner_blocks.0.attn.wo",
            "text_fusion.refiner_blocks.0.attn.to_out.0",
        ),
        (
            "hidream",
            "diffusion_model.single_stream_blocks.0.block.attn1.to_q",
            "single_stream_blocks.0.block.attn1.to_q",
        ),
        ("hidream_o1", "diffusion_model.x_embedder.proj1", "model.x_embedder.proj1"),
        (
            "hidream_o1",
            "diffusion_model.model.language_model.layers.1.mlp.up_proj",
            "model.language_model.layers.1.mlp.up_proj",
        ),
    ],
)
def test_lokr_that_diffusers_does_not_read(
    new_studio: Get, tmp_path: Path, model: str, stem: str, path: str
) -> None:
    used = new_studio(model)
    layer = used.engine._pipeline.transformer.get_submodule(path)
    out, into = layer.weight.shape
    w1, w2 = torch.eye(4) + 1, torch.linspace(-1, 1, out * into // 16).reshape(out // 4, into // 4)
    tensors = {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1e10)}
    save_file(tensors, tmp_path / "lokr.safetensors")
    plain = used.picture()
    used.engine.use([(open_lora(tmp_path, "lokr.safetensors"), 0.5)])
    ours = used.picture()
    used.engine.use([])
    layer.weight.data += 0.5 * torch.kron(w1, w2)
    assert largest_difference(ours, used.picture()) <= 1
    assert largest_difference(ours, plain) > 1
