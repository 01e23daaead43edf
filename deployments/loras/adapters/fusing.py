"""For a long run of one LoRA: weights that have it in them, and no work beside them.

The fused weights are new ones in the layers' places; the pristine ones are never written, and come back as
they are. The sums are formed in float32 and rounded once to the dtype of the weights, as the trainer merges a
LoRA for its previews; beside the weights, in bfloat16, the same LoRA gives slightly other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from deployments.loras.adapters.deltas import Delta, Layer
from deployments.loras.adapters.packed import LayerName

Active: TypeAlias = tuple[Mapping[LayerName, Delta], float]
"""The deltas of an adapter, and its multiplier."""


class Fuser:
    """Fuses adapters with `layers`, whose weights must be on the device; holds both kinds of weights then."""

    def __init__(self, layers: Mapping[LayerName, Layer]) -> None:
        self._layers = layers
        self._pristine: dict[LayerName, Tensor] = {}

    @property
    def fused(self) -> bool:
        """Whether any layer has fused weights."""
        return bool(self._pristine)

    def fuse(self, active: Sequence[Active], *, in_file_dtype: bool) -> None:
        """Put these adapters into the weights, or leave all as it was where that fails.

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
                self._pristine[name], layer.weight = layer.weight, fused
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the pristine weights back."""
        for name, weight in self._pristine.items():
            self._layers[name].weight = weight
        self._pristine.clear()
