"""Compiled blocks with room for LoRAs: switching overwrites numbers, and nothing is compiled again.

A model's repeated blocks are compiled one by one, as diffusers' `compile_repeated_blocks` does. Each linear
layer in them gets matrices of rank `RANK`, and a hook that is compiled with it. Several LoRAs share these
matrices, each with its own rows and columns, and the rest has a scale of zero. If an adapter does not fit
there (LoKr, ranks that add up to more, products in the file's dtype), the prompt runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from deployments.loras.adapters.fusing import Active
from deployments.loras.adapters.layer_deltas import Delta, Layer, LowRank
from deployments.loras.adapters.packed_adapter import LayerName

RANK = 64
"""The rank that compiled layers have room for. Trainers write 16 to 64 by default."""

Part: TypeAlias = tuple[Delta, float, bool]
"""A delta of a layer, its factor, and whether its product is rounded to the dtype of its file."""


class Compiled:
    """The compiled blocks of a pipeline's models. `backend` is that of `torch.compile`.

    The attribute `layers` has the layers in these blocks. Put no other hook on them, or each block would be
    compiled again. Raises `ValueError` if no model of the pipeline names its repeated blocks.
    """

    def __init__(
        self,
        pipeline: Any,  # noqa: ANN401 - any pipeline
        layers: Mapping[LayerName, Layer],
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        blocks = list(_repeated_blocks(pipeline))
        if not blocks:
            raise ValueError("the model cannot be compiled, because it names no repeated blocks")
        inside = {layer for block in blocks for layer in block.modules()}
        self.layers = {name: layer for name, layer in layers.items() if layer in inside}
        self._rooms = {name: _Room(layer) for name, layer in self.layers.items()}
        self._held: Mapping[LayerName, Sequence[Part]] = {}
        for block in blocks:
            block.compile(backend=backend)

    @contextmanager
    def holding(self, active: Sequence[Active], *, in_file_dtype: bool) -> Iterator[None]:
        """Make these adapters active in compiled layers. If one does not fit, the block runs uncompiled."""
        wanted: dict[LayerName, list[Part]] = {}
        for deltas, multiplier in active:
            for name in deltas.keys() & self.layers.keys():
                part = deltas[name], multiplier * deltas[name].scale, in_file_dtype
                wanted.setdefault(name, []).append(part)
        before = self._held
        self._hold(wanted)
        fits = all(self._rooms[name].fit for name in wanted)
        try:
            with nullcontext() if fits else torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._hold(before)

    def _hold(self, wanted: Mapping[LayerName, Sequence[Part]]) -> None:
        for name in self._held.keys() - wanted.keys():
            self._rooms[name].hold(())
        for name, parts in wanted.items():
            self._rooms[name].hold(parts)
        self._held = wanted


class _Room:
    """The deltas of one compiled layer: combined in its matrices, or one by one where it runs uncompiled.

    The matrices are buffers of the layer, and all layers share one hook function. So each block looks the
    same to the compiler.
    """

    def __init__(self, layer: Any) -> None:  # noqa: ANN401 - a layer with more attributes
        self._layer = layer
        self._linear = isinstance(layer, torch.nn.Linear)
        self.fit = True
        layer.lora_parts = ()
        if self._linear:
            zeros = layer.weight.new_zeros
            layer.register_buffer("lora_down", zeros(RANK, layer.in_features), persistent=False)
            layer.register_buffer("lora_up", zeros(layer.out_features, RANK), persistent=False)
            layer.register_buffer("lora_scale", zeros(RANK), persistent=False)
        layer.register_forward_hook(_add if self._linear else _add_parts)

    def hold(self, parts: Sequence[Part]) -> None:
        """Replace the deltas. `fit` is True if the matrices have room for the new ones."""
        self._layer.lora_parts = parts
        self.fit = self._linear and self._has_room(parts)
        if self._linear:
            self._layer.lora_scale.zero_()
            if self.fit:
                self._fill(parts)

    def _has_room(self, parts: Sequence[Part]) -> bool:
        return (
            all(_is_plain(*part, self._layer.weight.dtype) for part in parts)
            and sum(delta.tensors[0].shape[0] for delta, _, _ in parts) <= RANK
        )

    def _fill(self, parts: Sequence[Part]) -> None:
        start = 0
        for delta, factor, _ in parts:
            down, up = delta.tensors
            stop = start + down.shape[0]
            self._layer.lora_down[start:stop].copy_(down)
            self._layer.lora_up[:, start:stop].copy_(up)
            self._layer.lora_scale[start:stop].fill_(factor)
            start = stop


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ANN401
    """Forward hook: add the deltas of a compiled linear layer to its output."""
    if not torch.compiler.is_compiling():
        return _add_parts(layer, inputs, output)
    inner = functional.linear(inputs[0].to(layer.lora_down.dtype), layer.lora_down) * layer.lora_scale
    return output + functional.linear(inner, layer.lora_up).to(output.dtype)


def _add_parts(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ANN401
    for delta, factor, in_file_dtype in layer.lora_parts:
        added = delta(layer, inputs[0], factor, in_file_dtype=in_file_dtype)
        output = output + added.to(output.dtype)
    return output


def _is_plain(delta: Delta, _: float, in_file_dtype: bool, dtype: torch.dtype) -> bool:
    """Return whether the delta is a product of two matrices without intermediate rounding."""
    return isinstance(delta, LowRank) and not (in_file_dtype and delta.file_dtype.itemsize < dtype.itemsize)


def _repeated_blocks(pipeline: Any) -> Iterator[torch.nn.Module]:  # noqa: ANN401 - any pipeline
    for model in pipeline.components.values():
        names = getattr(model, "_repeated_blocks", None) or ()
        if isinstance(model, torch.nn.Module):
            yield from (block for block in model.modules() if type(block).__name__ in names)
