"""Projections that are stored head by head, compared with diffusers' own loader."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_minimax_h3_lora_to_diffusers

from cluster.failures import JobFailure
from deployments.loras.adapters.projections_by_head import sort_by_projection


@pytest.mark.parametrize("stem", ["blocks.0", "token_refiner.blocks.0"])
def test_rows_come_as_diffusers_reads_them(stem: str) -> None:
    heads = 3
    file = {
        f"{stem}.attn.qkv_proj.lora_A.default.weight": torch.randn(4, 8),
        f"{stem}.attn.qkv_proj.lora_B.default.weight": torch.randn(3 * heads * 128, 4),
        f"{stem}.attn.out_proj.lora_A.default.weight": torch.randn(4, heads * 128),
        f"{stem}.attn.out_proj.lora_B.default.weight": torch.randn(8, 4),
    }
    theirs = _convert_non_diffusers_minimax_h3_lora_to_diffusers(dict(file))
    expected = [tensor for name, tensor in theirs.items() if ".to_out" not in name and "lora_B" in name]
    ours = sort_by_projection(file)
    assert torch.equal(ours[f"{stem}.attn.qkv_proj.lora_B.default.weight"], torch.cat(expected))
    assert all(ours[name] is file[name] for name in file if "qkv_proj.lora_B" not in name)


def test_other_files_are_as_they_were() -> None:
    file = {
        "diffusion_model.blocks.0.attn.qkv_proj.lora_B.weight": torch.randn(384, 4),
        "transformer_blocks.0.attn.to_q.lora_B.default.weight": torch.randn(384, 4),
    }
    assert all(tensor is file[name] for name, tensor in sort_by_projection(file).items())


def test_rows_that_make_no_heads_are_refused() -> None:
    with pytest.raises(JobFailure, match="heads of 128"):
        sort_by_projection({"blocks.0.attn.qkv_proj.lora_B.default.weight": torch.randn(100, 4)})
