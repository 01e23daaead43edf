"""From the module names in LoRA files to the layers of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from deployments.loras.deltas import Layer
from deployments.loras.originals import ORIGINAL_NAMES

_DENOISERS = ("transformer", "unet")

_PREFIXES: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(r"^lora_te1?_"), "text_encoder"),
    (re.compile(r"^lora_te([23])_"), r"text_encoder_\1"),
    (re.compile(r"^(lora_unet_|lora_transformer_|lycoris_|diffusion_model\.|base_model\.model\.)"), None),
    (re.compile(r"^(text_encoder(?:_\d)?|transformer|unet)\."), r"\1"),
)
"""Prefix of a module's name in files, and the pipeline's component it means (none: the denoiser)."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a module of a file means: one layer, or several whose outputs side by side are the module's.

    There is no layer where the pipeline has no such module.
    """

    component: str
    layers: tuple[Layer, ...]


class Targets:
    """The linear and convolution layers of a pipeline's models, by every name that files give them."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        models = {name: model for name, model in components.items() if isinstance(model, torch.nn.Module)}
        self.denoiser = next(name for name in _DENOISERS if name in models)
        self._layers = {name: _aliases(model) for name, model in models.items()}

    def find(self, stem: str) -> Target:
        """Return the layers that a module's name in a file means."""
        component = self.denoiser
        for prefix, meant in _PREFIXES:
            if match := prefix.match(stem):
                component = match.expand(meant) if meant else self.denoiser
                stem = stem[match.end() :]
                break
        return Target(component, self._layers.get(component, {}).get(stem.replace(".processor.", "."), ()))


def _aliases(model: torch.nn.Module) -> dict[str, tuple[Layer, ...]]:
    """Layers by dotted path and by kohya's form of it, which has underscores for dots."""
    layers: dict[str, tuple[Layer, ...]] = {}

    def add(name: str, found: tuple[Layer, ...]) -> None:
        layers.setdefault(name, found)
        layers.setdefault(name.replace(".", "_"), found)

    for path, module in model.named_modules():
        if isinstance(module, Layer):
            # Transformers 5 dropped a level of CLIP's text model that files still name; attention processors
            # of older diffusers had no index in `to_out`.
            for name in (path, f"text_model.{path}", path.removesuffix(".0")):
                add(name, (module,))
    for original, paths in ORIGINAL_NAMES:
        for block in count():
            names = [path.format(block) for path in paths]
            if not all(name in layers for name in names):
                break
            add(original.format(block), tuple(layer for name in names for layer in layers[name]))
    return layers
