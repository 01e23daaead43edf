"""Cost of a LoRA switch: `python -m tests.benchmarks.lora [--device cuda]`.

Adapters of rank 16 and 64 cover every linear layer in the blocks of FLUX.1, with full depth, real shapes and
random weights. Each of the model's weights is one number expanded to the layer's shape: no switch reads them,
and real ones would take 24 GB. The kinds of switch take turns, so that a busy machine slows all. The last
line is one JSON object:

- `resident_switch_ms`: to another adapter on the device, rank 16;
- `host_switch_over_floor`: from host memory, rank 16, over a copy of as many bytes into memory in use;
- `hotswap_over_ours`: diffusers' hot swap from a state dict in memory over ours from host memory, rank 16;
- `rotation8_over_one`: jobs per second with 8 LoRAs in turns over one LoRA (`tests.benchmarks.rotation`), and
  the same for 64 LoRAs, and with `_2` for two replicas.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from deployments.loras.adapters.active_adapters import Adapters
from deployments.loras.adapters.conversion import Converter, layers_of
from deployments.loras.adapters.host_tier import HostTier
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora
from tests.benchmarks.rotation import measure_rotations

StateDict: TypeAlias = Mapping[str, torch.Tensor]

RANKS = (16, 64)
REPLICAS = (1, 2)
ROUNDS = 7
ROOM = 1 << 40
"""A budget in bytes that is never reached here."""


def flux(device: torch.device) -> FluxTransformer2DModel:
    """Return FLUX.1's transformer in bfloat16; each weight is one zero expanded to the real shape."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=torch.bfloat16, device=device).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
    return model


def write_lora(path: Path, model: torch.nn.Module, rank: int, seed: int) -> None:
    """Write a LoRA in bfloat16 for each linear layer in the model's blocks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks." in name:
            down = torch.rand(rank, layer.in_features, generator=generator)
            up = torch.rand(layer.out_features, rank, generator=generator)
            tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16()
            tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16()
    save_file(tensors, path)


class Ours:
    """The host and device tiers on layers that are never run."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        layers = layers_of(SimpleNamespace(components={"transformer": model}))
        host = HostTier(Converter(layers, pinned=device.type == "cuda"), ROOM)
        self._adapters = Adapters(layers, host, device, ROOM)

    def switch(self, file: LoraFile) -> None:
        """Make an adapter active, from any tier."""
        self._adapters.activate([(file, 1.0)])

    def forget(self) -> None:
        """Leave adapters in host memory only."""
        self._adapters.drop()


def timed(device: torch.device, action: Callable[[], object]) -> float:
    """Return the seconds of the action, including the work still queued on the device."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_switches(folder: Path, rank: int, device: torch.device) -> dict[str, float]:
    """Return the median of each kind of switch in ms, and the LoRA's size in MB."""
    model = flux(device)
    paths = [folder / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        write_lora(path, model, rank, seed)
    a, b = (open_lora(folder, path.name) for path in paths)
    ours = Ours(model, device)
    taken = {"disk": [timed(device, partial(ours.switch, file)) for file in (a, b)]}
    source = torch.zeros(a.bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.zeros(a.bytes, dtype=torch.uint8, device=device)
    theirs = flux(device)
    states = [load_file(path, device="cpu") for path in paths]
    theirs.load_lora_adapter(dict(states[0]), adapter_name="hot")
    ways: Mapping[str, Callable[[LoraFile, StateDict], object]] = {
        "resident": lambda file, _: ours.switch(file),
        "floor": lambda *_: there.copy_(source, non_blocking=True),
        "allocate + copy": lambda *_: source.to(device, non_blocking=True, copy=True),
        "host": lambda file, _: ours.switch(file),
        "hotswap": lambda _, state: theirs.load_lora_adapter(dict(state), adapter_name="hot", hotswap=True),
    }
    for turn in range(ROUNDS):
        for way, switch in ways.items():
            ours.switch((a, b)[turn % 2])
            if way == "host":
                ours.forget()
            change = partial(switch, (b, a)[turn % 2], states[turn % 2])
            taken.setdefault(way, []).append(timed(device, change))
    theirs.delete_adapters("hot")
    taken["load + set_adapters"] = [timed(device, partial(load_and_set, theirs, path)) for path in paths]
    modules = sum(isinstance(m, torch.nn.Linear) and "blocks." in name for name, m in model.named_modules())
    medians = {way: 1000 * statistics.median(seconds) for way, seconds in taken.items()}
    return {"modules": modules, "MB": a.bytes / 1e6, **medians}


def load_and_set(model: FluxTransformer2DModel, path: Path) -> None:
    """Load a file onto the model as diffusers and peft users do."""
    model.load_lora_adapter(load_file(path), adapter_name="cold")
    model.set_adapters(["cold"], [1.0])
    model.delete_adapters("cold")


def show(title: str, figures: Mapping[str, float]) -> None:
    table = Table(title=title)
    for name in figures:
        table.add_column(name)
    table.add_row(*(f"{value:.3g}" for value in figures.values()))
    Console().print(table)


def main() -> None:
    """Run all measurements, draw the tables, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args().device)
    switches = {}
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as scratch:
            switches[rank] = measure_switches(Path(scratch), rank, device)
        show(f"rank {rank}, {device}: ms to another LoRA (disk: read, checked and converted)", switches[rank])
    rotations = {}
    for replicas in REPLICAS:
        with tempfile.TemporaryDirectory() as scratch:
            rotations[replicas] = measure_rotations(Path(scratch), replicas, device.type)
        rates = {f"{loras} in turns": figure for loras, figure in rotations[replicas].items()}
        show(f"jobs per second, replicas: {replicas}", rates)
    small = switches[RANKS[0]]
    figures = {
        "resident_switch_ms": small["resident"],
        "host_switch_over_floor": small["host"] / small["floor"],
        "hotswap_over_ours": small["hotswap"] / small["host"],
        "rotation8_over_one": rotations[1][8] / rotations[1][1],
        "rotation64_over_one": rotations[1][64] / rotations[1][1],
        "rotation8_over_one_2": rotations[2][8] / rotations[2][1],
        "rotation64_over_one_2": rotations[2][64] / rotations[2][1],
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
