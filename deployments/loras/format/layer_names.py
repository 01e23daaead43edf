"""Maps module names in LoRA files to layers of a pipeline. Works on names alone and imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from deployments.loras.format.original_names import ORIGINAL_NAMES, SWAPPED, WITHOUT_EFFECT, unet_names

Shape: TypeAlias = tuple[int, ...]

Layout: TypeAlias = Mapping[str, Mapping[str, Shape]]
"""Weight shapes of a pipeline's linear and convolution layers, by component and dotted path."""

_DENOISERS = ("transformer", "unet")

_T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q"

_DENOISER, _T5 = "denoiser", "t5"

_PREFIXES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^(lora_te1?_|text_encoders\.clip_l\.transformer\.)"), "text_encoder"),
    (re.compile(r"^(lora_te2_|text_encoders\.clip_g\.transformer\.)"), "text_encoder_2"),
    (re.compile(r"^(lora_te3_|text_encoders\.t5xxl\.transformer\.)"), _T5),
    (
        re.compile(
            r"^(lora_unet_|lora_transformer_|lycoris_|(model\.)?diffusion_model\.|base_model\.model\.)"
        ),
        _DENOISER,
    ),
    (re.compile(r"^text_embedding_projection\."), "connectors"),
    (re.compile(r"^(text_encoder(?:_\d)?|transformer|connectors|unet)\."), r"\1"),
)
"""Prefixes of module names in files, and the component that each means. No prefix means the denoiser."""


@dataclass(frozen=True, slots=True)
class Target:
    """The layers that a module of a file changes. The outputs of several, side by side, are the module's.

    - `layers` are paths in the component. It is empty if the pipeline has no such module.
    - `swapped` means that the layer has the two halves of the module's outputs in the opposite order.
    - `without_effect` means that `layers` is empty and no warning is due.
    """

    component: str
    layers: tuple[str, ...]
    swapped: bool = False
    without_effect: bool = False


class Targets:
    """The layers of a pipeline's models, by every name that LoRA files use for them."""

    def __init__(self, layout: Layout) -> None:
        self.denoiser = next(name for name in _DENOISERS if name in layout)
        t5 = next((name for name, layers in layout.items() if _T5_LAYER in layers), "text_encoder_3")
        self._components = {_DENOISER: self.denoiser, _T5: t5}
        self._layers = {name: _aliases(layers) for name, layers in layout.items()}
        self._without_effect = {
            name: [pattern for part, pattern in WITHOUT_EFFECT.items() if _has(layers, part)]
            for name, layers in layout.items()
        }

    def find(self, stem: str, denoiser: str | None = None) -> Target:
        """Return the layers of the module that a file calls `stem`.

        For a model with two transformers, files always name the first. `denoiser` is the one to change.
        """
        component = self.denoiser
        for prefix, name in _PREFIXES:
            if match := prefix.match(stem):
                component = self._components.get(name) or match.expand(name)
                stem = stem[match.end() :]
                break
        if denoiser and component == self.denoiser:
            component = denoiser
        name = stem.replace(".processor.", ".")
        if any(pattern.fullmatch(name) for pattern in self._without_effect.get(component, ())):
            return Target(component, (), without_effect=True)
        layers = self._layers.get(component, {}).get(name, ())
        return Target(component, layers, bool(layers) and SWAPPED.fullmatch(name) is not None)


def _aliases(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return layers by every name for them, with dots and in kohya's form, with underscores."""
    layers: dict[str, tuple[str, ...]] = {}

    def add(name: str, found: tuple[str, ...]) -> None:
        layers.setdefault(name, found)
        layers.setdefault(_flat(name), found)

    paths = list(paths)
    for path in paths:
        # Files still name a level of CLIP's text model that transformers 5 dropped. Attention processors of
        # older diffusers had no index in `to_out`. The trainer leaves out the top level of HiDream-O1.
        for name in (path, f"text_model.{path}", path.removesuffix(".0"), path.removeprefix("model.")):
            add(name, (path,))
    for original, path in unet_names(paths):
        add(original, (path,))
    for part, names in ORIGINAL_NAMES.items():
        if not _has(paths, part):
            continue
        for original, formats in names:
            for block in count() if "{}" in original else (0,):
                renamed = [path.format(block) for path in formats]
                if not all(name in layers for name in renamed):
                    break
                add(original.format(block), tuple(layer for name in renamed for layer in layers[name]))
    return layers


def _has(paths: Iterable[str], part: str) -> bool:
    return any(f"{path}.".startswith(f"{part}.") for path in paths)


def _flat(name: str) -> str:
    return name.replace(".", "_")
