"""Fuses adapters into the weights, which saves the work of the hooks in a long run of the same LoRAs.

The fused weights are new tensors that replace the layers' own. The original tensors are never written, and
are put back later. The sums are computed in float32 and rounded once to the dtype of the weights, as the
trainer merges a LoRA for its previews. Unfused, in bfloat16, the same LoRA gives slightly different numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from deployments.loras.adapters.layer_deltas import Delta, Layer
from deployments.loras.adapters.packed_adapter import LayerName

Active: TypeAlias = tuple[Mapping[LayerName, Delta], float]
"""The deltas of an adapter, and its multiplier."""


class Fuser:
    """Fuses adapters into `layers`, whose weights must be on the device. Keeps the original weights too."""

    def __init__(self, layers: Mapping[LayerName, Layer]) -> None:
        self._layers = layers
        self._originals: dict[LayerName, Tensor] = {}

    @property
    def fused(self) -> bool:
        """True if any layer has fused weights."""
        return bool(self._originals)

    def fuse(self, active: Sequence[Active], *, in_file_dtype: bool) -> None:
        """Fuse these adapters into the weights. If that fails, all weights are as before.

        With `in_file_dtype` their products are rounded to the dtype of their files.
        """
        try:
            for name in dict.fromkeys(name for deltas, _ in active for name in deltas):
                layer = self._layers[name]
                total = layer.weight.detach().to(torch.float32, copy=True)
                for deltas, multiplier in active:
                    if delta := deltas.get(name):
                        total += delta.weight(multiplier * delta.scale, in_file_dtype=in_file_dtype)
                fused = torch.nn.Parameter(total.to(layer.weight.dtype), layer.weight.requires_grad)
                self._originals[name], layer.weight = layer.weight, fused
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the original weights back."""
        for name, weight in self._originals.items():
            self._layers[name].weight = weight
        self._originals.clear()
