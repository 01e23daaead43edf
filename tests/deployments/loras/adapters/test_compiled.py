"""LoRAs on compiled blocks: same results as uncompiled blocks, and no recompilation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from deployments.engine.tiny import TINY_FLUX
from deployments.loras.adapters.active_adapters import Adapters
from deployments.loras.adapters.compiled import RANK, Compiled
from deployments.loras.adapters.conversion import Converter, layers_of
from deployments.loras.adapters.host_tier import HostTier
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora

CPU = torch.device("cpu")

BLOCK = "transformer.single_transformer_blocks.0.attn"


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Flux:
    """The tiny FLUX.1's transformer with fixed weights, compiled or not."""

    def __init__(self, *, compiled: bool) -> None:
        stated = json.loads((TINY_FLUX / "transformer" / "config.json").read_text())
        self._config = {name: value for name, value in stated.items() if name[0] != "_"}
        self._config |= {"num_layers": 4, "num_single_layers": 4}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self._model = FluxTransformer2DModel(**self._config).eval()
        pipeline = SimpleNamespace(components={"transformer": self._model})
        layers = layers_of(pipeline)
        host = HostTier(Converter(layers, pinned=False), 1 << 30)
        # The eager backend captures the same graphs as any other backend, in less time.
        blocks = Compiled(pipeline, layers, backend="eager") if compiled else None
        self._adapters = Adapters(layers, host, CPU, 1 << 30, compiled=blocks)

    def run(self, loras: Sequence[tuple[LoraFile, float]], joined: LoraFile | None = None) -> torch.Tensor:
        self._adapters.activate(loras)
        inputs: dict[str, Any] = {
            "hidden_states": noise(1, 16, self._config["in_channels"]),
            "encoder_hidden_states": noise(1, 8, self._config["joint_attention_dim"]),
            "pooled_projections": noise(1, self._config["pooled_projection_dim"]),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
            "guidance": torch.tensor([3.5]) if self._config["guidance_embeds"] else None,
        }
        with torch.inference_mode(), self._adapters.rendering():
            if joined is None:
                return self._model(**inputs, return_dict=False)[0]
            with self._adapters.joined_by(joined, 0.5):
                self._model(**inputs, return_dict=False)
            return self._model(**inputs, return_dict=False)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoraFile]:
    folder = tmp_path_factory.mktemp("loras")

    def low_rank(rank: int, *stems: str) -> dict[str, torch.Tensor]:
        return {
            f"{stem}.lora_{side}.weight": noise(*shape) / 8
            for stem in stems
            for side, shape in (("A", (rank, 32)), ("B", (32, rank)))
        }

    lokr = {f"{BLOCK}.to_k.lokr_w1": noise(4, 4) / 2, f"{BLOCK}.to_k.lokr_w2": noise(8, 8) / 2}
    contents = {
        "low": low_rank(2, f"{BLOCK}.to_q", f"{BLOCK}.to_v"),
        "higher": low_rank(5, f"{BLOCK}.to_k", "transformer.transformer_blocks.1.attn.to_q"),
        "outside": low_rank(3, f"{BLOCK}.to_q", "transformer.context_embedder"),
        "too high": low_rank(RANK + 1, f"{BLOCK}.to_q"),
        "LoKr": lokr,
    }
    for name, tensors in contents.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: open_lora(folder, f"{name}.safetensors") for name in contents}


@pytest.mark.slow
def test_no_switch_compiles_anything_again(
    files: dict[str, LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = Flux(compiled=False), Flux(compiled=True)
    compiled.run([])
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 4  # Two kinds of blocks with two kinds of inputs each, not eight blocks.
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    low, higher, outside = files["low"], files["higher"], files["outside"]
    differences = []
    for loras in (
        [(low, 1.0)],
        [(higher, 0.5)],
        [],
        [(low, -2.0)],
        [(files["LoKr"], 1.0)],
        [(low, 0.5), (higher, 1.0), (low, 0.25)],
        [(files["too high"], 0.25)],
        [(outside, 1.0)],
        [(files["LoKr"], 0.5), (low, 1.0)],
        [(low, 1.0)],
    ):
        expected = plain.run(loras)
        torch.testing.assert_close(compiled.run(loras), expected, atol=1e-5, rtol=1e-4)
        differences.append((expected - plain.run([])).abs().max().item())
    assert [difference > 1e-3 for difference in differences] == [True, True, False, *[True] * 7]
    alone = compiled.run([(low, 1.0)])
    assert torch.equal(compiled.run([(low, 1.0)], joined=higher), alone)
    assert torch.equal(compiled.run([(low, 1.0)], joined=files["LoKr"]), alone)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_model_without_repeated_blocks_is_not_compiled() -> None:
    pipeline = SimpleNamespace(components={"unet": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no repeated blocks"):
        Compiled(pipeline, layers_of(pipeline))
