"""Small pictures on a real engine, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from deployments.engine.engine import Engine
from deployments.engine.job import Unwatched
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora
from deployments.spec.job import PromptSpec
from tests.parity.cases import FOLDER


class Studio:
    """Renders small pictures on one engine with the LoRA files of its id."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loras = FOLDER / engine.spec.id / "lora"
        # For a model with two transformers, the name of one file stands for its pair.
        names = (file.name for file in self.loras.iterdir())
        self.names = sorted(name for name in names if not name.endswith("_low_noise.safetensors"))
        self.controls = [Image.linear_gradient("L").convert("RGB")] * engine.spec.control_images.least

    def prompt(self, **fields: Any) -> PromptSpec:
        """Return a small prompt with some fields changed."""
        defaults = {"prompt": "a red bicycle", "neg": "", "width": 96, "height": 64, "steps": 2, "seed": 5}
        spec = self.engine.spec
        own = {"guidance": spec.guidance, "options": dict(spec.options)}
        video = {"num_frames": 5, "fps": 16} if spec.video else {}
        return PromptSpec(**{**defaults, **own, **video, **fields})

    def picture(self, **fields: Any) -> np.ndarray:
        """Return one prompt's picture (uint8, H x W x 3) or video (F x H x W x 3) with the current LoRAs."""
        controls = fields.pop("controls", self.controls)
        return self.engine.render(self.prompt(**fields), controls, Unwatched()).pixels

    def render(self, loras: Mapping[str, float], **fields: Any) -> np.ndarray:
        """Return the picture of one prompt with these LoRA files (name: multiplier)."""
        self.engine.use([(file, value) for name, value in loras.items() for file in self.files(name)])
        return self.picture(**fields)

    def files(self, name: str) -> list[LoraFile]:
        """Open one of the id's files, or the pair that it stands for."""
        return [
            replace(open_lora(self.loras, name.replace("high", expert or "high")), expert=expert)
            for expert in self.engine.spec.experts or (None,)
        ]


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    """Return the largest difference between two pictures, in steps of 1/255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())
