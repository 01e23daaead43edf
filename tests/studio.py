"""Small pictures on a real engine, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from deployments.engine import Engine
from deployments.loras.references import open_lora
from deployments.render import PromptSpec
from deployments.rendering import Unwatched
from tests.parity.cases import FOLDER


class Studio:
    """Renders small pictures on one engine with the LoRA files of its id."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loras = FOLDER / engine.spec.id / "lora"
        self.names = sorted(file.name for file in self.loras.iterdir())
        self.controls = [Image.linear_gradient("L").convert("RGB")] * engine.spec.control_images.least

    def prompt(self, **fields: Any) -> PromptSpec:
        """Return a small prompt with some fields of its own."""
        defaults = {"prompt": "a red bicycle", "neg": "", "width": 96, "height": 64, "steps": 2, "seed": 5}
        spec = self.engine.spec
        return PromptSpec(**{**defaults, "guidance": spec.guidance, "options": dict(spec.options), **fields})

    def picture(self, **fields: Any) -> np.ndarray:
        """Return the picture of one prompt with what is active now, uint8 H x W x 3."""
        controls = fields.pop("controls", self.controls)
        return self.engine.render(self.prompt(**fields), controls, Unwatched()).pixels

    def render(self, loras: Mapping[str, float], **fields: Any) -> np.ndarray:
        """Return the picture of one prompt with these of the id's files and their multipliers."""
        self.engine.use([(open_lora(self.loras, name), value) for name, value in loras.items()])
        return self.picture(**fields)


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    """Return the largest difference of two pictures, in steps of 1/255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())
