from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from safetensors.torch import load_file

from deployments.engine.tiny import TINY_FLUX, materialize, write_tiny_checkpoints, write_tiny_lora
from deployments.loras.format.header import read_header


def test_weights_follow_the_rule(tmp_path: Path) -> None:
    materialize(TINY_FLUX, tmp_path)
    weights = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")

    def normal(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(weights[name].shape, generator=generator)

    matrix, bias = "context_embedder.weight", "context_embedder.bias"
    scale = "transformer_blocks.0.attn.norm_q.weight"
    assert torch.equal(weights[matrix], normal(matrix) / math.sqrt(32))
    assert torch.equal(weights[bias], 0.1 * normal(bias))
    assert torch.equal(weights[scale], 1 + 0.1 * normal(scale))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_tied_parameter_takes_the_values_of_its_first_name(tmp_path: Path) -> None:
    materialize(TINY_FLUX, tmp_path)
    encoder = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32).text_encoder_2
    name = "encoder.embed_tokens.weight"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    expected = torch.randn(encoder.shared.weight.shape, generator=generator) / math.sqrt(32)
    assert torch.equal(encoder.shared.weight, expected)
    assert torch.equal(encoder.encoder.embed_tokens.weight, expected)


def test_a_component_alone_is_known_by_its_config(tmp_path: Path) -> None:
    materialize(TINY_FLUX, tmp_path / "whole")
    for name, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        materialize(TINY_FLUX / name, tmp_path / name)
        alone = tmp_path / name / f"{file}.safetensors"
        assert alone.read_bytes() == (tmp_path / "whole" / name / f"{file}.safetensors").read_bytes()


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    materialize(TINY_FLUX, tmp_path / "checkpoint")
    write_tiny_lora(tmp_path / "a.safetensors", seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_stand_ins_of_flux_and_kontext(tmp_path: Path) -> None:
    write_tiny_checkpoints(tmp_path)
    for name, pipeline in (("FLUX.1-dev", FluxPipeline), ("FLUX.1-Kontext-dev", FluxKontextPipeline)):
        folder = tmp_path / f"black-forest-labs--{name}"
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == pipeline.__name__
        pipeline.from_pretrained(folder, dtype=torch.float32)


def test_loras_differ_by_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        write_tiny_lora(tmp_path / f"{name}.safetensors", seed)
    first, second, third = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert first == third != second
    names = read_header(tmp_path / "a.safetensors").tensors
    assert "transformer.single_transformer_blocks.1.attn.to_q.lora_A.weight" in names
