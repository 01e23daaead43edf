"""The real engine on a tiny FLUX, slowed to the times of a full-size model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from deployments.catalog import CATALOG
from deployments.engine import engine as engines
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine
from deployments.engine.media import Media
from deployments.engine.progress import Observer
from deployments.loras.adapters.conversion import Converter
from deployments.loras.adapters.packed_adapter import Packed
from deployments.loras.sources.lora_file import LoraFile
from deployments.spec.job import PromptSpec

RUN_S = 0.8
"""Seconds per job: a few steps of a distilled model."""

LOAD_S = 1.6
"""Seconds to load a LoRA from the disk: rank 128 on all layers of FLUX.1, 1.37 GB, at 0.86 GB/s."""

RESIDENT = 5
"""How many LoRAs a replica holds; one more evicts the least recently used."""


class SlowConverter(Converter):
    """Takes `LOAD_S` for a file, on any thread."""

    def __call__(self, file: LoraFile) -> Packed:
        begun = time.monotonic()
        packed = super().__call__(file)
        time.sleep(max(begun + LOAD_S - time.monotonic(), 0))
        return packed


class SlowEngine(Engine):
    """Takes `RUN_S` for a picture."""

    def render(self, prompt: PromptSpec, controls: Sequence[Image.Image], observer: Observer) -> Media:
        begun = time.monotonic()
        media = super().render(prompt, controls, observer)
        time.sleep(max(begun + RUN_S - time.monotonic(), 0))
        return media


def slow_engine(folder: Path) -> SlowEngine:
    """Return a loaded engine with room for `RESIDENT` of the LoRAs in `folder/loras`, and no host tier."""
    torch.set_num_threads(1)
    engines.Converter = SlowConverter
    tensors = load_file(next((folder / "loras").iterdir()))
    size = sum(tensor.numel() * torch.float32.itemsize for tensor in tensors.values())
    engine = SlowEngine(
        CATALOG["flux"],
        Checkpoints(folder / "checkpoints", None),
        device="cpu",
        adapter_bytes=round((RESIDENT + 0.5) * size),
        host_adapter_bytes=0,
    )
    engine.load()
    return engine
