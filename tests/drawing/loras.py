"""Training of a style on top of the base, and its file as the trainer writes one."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from tests.drawing.flow import make_pairs, train
from tests.drawing.pictures import Style
from tests.drawing.text import TextSide

RANK = 12

_TARGETS = r".*transformer_blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_mlp|proj_out)"
"""Layers that picture tokens pass; those of the words alone stay as they are."""


def train_lora(
    vae: AutoencoderKL,
    base: FluxTransformer2DModel,
    text: TextSide,
    style: Style,
    path: Path,
    *,
    seed: int,
    steps: int,
) -> None:
    """Train a style and write its file."""
    model = copy.deepcopy(base).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_TARGETS))
    generator = torch.Generator().manual_seed(seed)
    pairs = make_pairs(vae, 1000, generator, style)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    train(model, text, pairs, [optimizer], steps=steps, generator=generator)
    tensors = {
        f"transformer.{name}": tensor.bfloat16().contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model).items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry of metadata: safetensors writes several in no fixed order.
    save_file(tensors, path, metadata={"ss_base_model_version": "flux.1"})
