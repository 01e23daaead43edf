from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.pipelines.hidream import complete, rounded_frequencies


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_schedule_is_shifted_twice(steps: int) -> None:
    pipeline = SimpleNamespace(tokenizer_4=SimpleNamespace(eos_token="<eos>", pad_token="<other>"))
    complete(pipeline)
    pipeline.scheduler.set_timesteps(steps, device="cpu")
    shift, start = math.exp(1.15), 0.99966645
    even = [start * (steps - step) / steps for step in range(steps)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    assert torch.allclose(pipeline.scheduler.sigmas, torch.tensor([*sigmas, 0.0]), atol=1e-6)
    assert pipeline.scheduler.timesteps.tolist() == [int(1000 * sigma) for sigma in sigmas]
    assert pipeline.tokenizer_4.pad_token == "<eos>"


@pytest.mark.parametrize(("dtype", "rounded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_previews_round_the_rotary_frequencies_of_llama(dtype: torch.dtype, rounded: bool) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.random.fork_rng():
        llama: Any = LlamaForCausalLM(config)
    llama.to(dtype)
    rotary = llama.model.rotary_emb
    rotary.inv_freq = exact = rotary.original_inv_freq.float() * 1.001
    with rounded_frequencies(SimpleNamespace(text_encoder_4=llama), {}):
        assert rotary.inv_freq.dtype == torch.float32
        assert torch.equal(rotary.inv_freq, exact.bfloat16().float() if rounded else exact)
        assert torch.equal(rotary.inv_freq, exact) is not rounded
    assert rotary.inv_freq is exact
