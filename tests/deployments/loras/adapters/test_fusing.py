"""Fused LoRAs: when they are fused, that pictures stay the same, and that the base weights are restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine
from deployments.engine.tiny import write_tiny_lora
from deployments.loras.adapters.layer_deltas import Delta, Kronecker, Layer, LowRank
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora
from tests.support.studio import Studio, largest_difference

Get = Callable[..., Studio]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


DELTAS: dict[str, tuple[Layer, Delta, tuple[int, ...]]] = {
    "linear": (torch.nn.Linear(6, 4), LowRank(noise(3, 6), noise(4, 3), 1.0, torch.float32), (5, 6)),
    "convolution": (
        torch.nn.Conv2d(6, 4, 3, padding=1, stride=2),
        LowRank(noise(3, 6, 3, 3), noise(4, 3, 1, 1), 1.0, torch.float32),
        (2, 6, 8, 8),
    ),
    "LoKr": (torch.nn.Linear(6, 4), Kronecker(noise(3, 2), noise(2, 3), 1.0, start=1, stop=5), (5, 6)),
}


@pytest.mark.parametrize("kind", DELTAS)
def test_the_weight_does_what_the_delta_does(kind: str) -> None:
    layer, delta, shape = DELTAS[kind]
    with torch.no_grad():
        x, beside = noise(*shape), delta(layer, noise(*shape), 0.7)
        layer.weight.copy_(delta.weight(0.7))
        layer.bias.zero_()  # type: ignore[union-attr]
        torch.testing.assert_close(layer(x), beside)


def test_products_in_the_dtype_of_the_file() -> None:
    layer, x = torch.nn.Linear(6, 4, bias=False), noise(5, 6)
    delta = LowRank(noise(3, 6), noise(4, 3), 1.0, torch.bfloat16)
    rounded = delta.weight(0.7, in_file_dtype=True)
    # The reference server adds `scale * (B @ A)` to a weight, rounded twice.
    assert torch.equal(rounded, (0.7 * (delta.up.bfloat16() @ delta.down.bfloat16())).float())
    assert torch.equal(delta(layer, x, 0.7, in_file_dtype=True), x @ rounded.T)
    assert not torch.equal(rounded, delta.weight(0.7))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[LoraFile]:
    folder = tmp_path_factory.mktemp("loras")
    for seed in range(2):
        write_tiny_lora(folder / f"{seed}.safetensors", seed)
    return [open_lora(folder, f"{seed}.safetensors") for seed in range(2)]


def test_a_run_of_one_lora_is_fused_and_leaves_no_trace(new_studio: Get, files: list[LoraFile]) -> None:
    a, b = files
    studio = new_studio("flux", fuse_after=2)
    weight = studio.engine._pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    plain, fused, pictures = studio.picture(), [], []
    for loras in ([(a, 0.5)],) * 4 + ([(b, 0.5)], [(a, 0.5)], [(a, 0.25)]):
        studio.engine.use(loras)
        pictures.append(studio.picture())
        fused.append(studio.engine.describe()["fused"])
    assert fused == [False, False, True, True, False, False, False]
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[2], pictures[3])
    assert largest_difference(pictures[0], plain) > 0
    assert largest_difference(pictures[1], pictures[2]) <= 1
    assert np.array_equal(pictures[5], pictures[0])
    assert studio.engine._pipeline.transformer.transformer_blocks[0].attn.to_q.weight is weight
    studio.engine.use([])
    assert np.array_equal(studio.picture(), plain)


def test_fused_loras_are_dropped_with_the_others(new_studio: Get, files: list[LoraFile]) -> None:
    studio = new_studio("flux", fuse_after=1)
    plain = studio.picture()
    studio.engine.use([(files[0], 1.0), (files[1], -0.5)])
    beside = studio.picture()
    assert largest_difference(beside, studio.picture()) <= 1
    assert studio.engine.describe()["fused"]
    studio.engine.drop_adapters()
    assert not studio.engine.describe()["fused"]
    assert np.array_equal(studio.picture(), plain)


def test_a_fusion_that_fails_leaves_the_weights(new_studio: Get, tmp_path: Path) -> None:
    """It fails half-way: the weights of the second of two layers have a shape that does not fit."""
    studio = new_studio("flux", fuse_after=1)
    save_file(
        {
            f"transformer.{path}.lora_{side}.weight": torch.ones(*shape) / 64
            for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q")
            for side, shape in (("A", (2, 32)), ("B", (32, 2)))
        },
        tmp_path / "a.safetensors",
    )
    studio.engine.use([(open_lora(tmp_path, "a.safetensors"), 1.0)])
    beside = studio.picture()
    layer = studio.engine._pipeline.transformer.transformer_blocks[0].attn.to_q
    pristine = layer.weight
    layer.weight = torch.nn.Parameter(torch.ones(31, 32))
    with pytest.raises(RuntimeError):
        studio.picture()
    layer.weight = pristine
    assert not studio.engine.describe()["fused"]
    studio.engine.use([])
    studio.engine.use([(open_lora(tmp_path, "a.safetensors"), 1.0)])
    assert np.array_equal(studio.picture(), beside)


def test_weights_that_move_are_not_fused() -> None:
    with pytest.raises(ValueError, match="offload"):
        Engine(CATALOG["flux"], Checkpoints(None, None), device="cuda", offload="model", fuse_after=1)
