"""The LoRA adapters on one pipeline: which are resident, and which are active with what multiplier.

An adapter never touches the model's weights or module tree, as peft's wrappers would. Each layer that some
adapter changes gets one forward hook, once, which adds the active adapters' deltas to the layer's output.
So a switch is a new list per layer, a multiplier holds for one job only, several adapters add up, LoRA and
LoKr meet on one layer, a failed load leaves nothing behind, and offload hooks stay in place. The arithmetic
is peft's own: `base(x) + up(down(x)) * scale`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cluster.jobs import FailureCode, JobFailure
from deployments.loras.conversion import rename
from deployments.loras.deltas import Delta, Layer, build
from deployments.loras.dialects import Role, dialect_of, group, stem_of
from deployments.loras.header import read_header, shorten, unsupported
from deployments.loras.references import LoraFile, digest
from deployments.loras.targets import Target, Targets

_EXAMPLES = 3

_Found = dict[str, tuple[Target, dict[Role, Tensor]]]
"""Modules of a file by their names in it: the layer each one means, and its tensors."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A resident LoRA: its delta for each layer it changes, its size on the device, what did not match."""

    deltas: Mapping[Layer, Delta]
    bytes: int
    warning: str | None


class _Slot:
    """The forward hook of one layer; with no active parts it changes nothing."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[tuple[Delta, float]] = []

    def __call__(self, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for delta, factor in self.parts:
            output = output + (delta(layer, inputs[0]) * factor).to(output.dtype)
        return output


class Adapters:
    """Adapters of one pipeline by the sha256 of their file, bounded in bytes: the least recently used go."""

    def __init__(self, pipeline: Any, device: torch.device, budget: int) -> None:  # noqa: ANN401 - any pipeline
        self._pipeline = pipeline
        self._device = device
        self._budget = budget
        self._targets = Targets(pipeline.components)
        self._resident: OrderedDict[str, Adapter] = OrderedDict()
        self._slots: dict[Layer, _Slot] = {}

    @property
    def resident(self) -> frozenset[str]:
        """The sha256 of each resident adapter."""
        return frozenset(self._resident)

    def activate(self, wanted: Sequence[tuple[LoraFile, float]]) -> list[str]:
        """Make exactly these adapters active, each with its multiplier; returns warnings.

        A resident adapter is taken as it is, without looking at its file. Raises `JobFailure`
        (LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, LORA_NOT_FOUND), and what was active stays so.
        """
        in_use = dict.fromkeys(file.sha256 for file, _ in wanted)
        for file, _ in wanted:
            if file.sha256 not in self._resident:
                self._resident[file.sha256] = self._load(file, in_use)
            self._resident.move_to_end(file.sha256)
        for slot in self._slots.values():
            slot.parts = []
        for file, multiplier in wanted:
            for layer, delta in self._resident[file.sha256].deltas.items():
                self._slot(layer).parts.append((delta, multiplier * delta.scale))
        self._make_room(0, in_use)
        return [warning for sha256 in in_use if (warning := self._resident[sha256].warning)]

    def form_products(self, *, in_file_dtype: bool) -> None:
        """Let the active LoRAs round their products to their file's dtype, or not."""
        for slot in self._slots.values():
            slot.parts = [(delta.formed(in_file_dtype=in_file_dtype), factor) for delta, factor in slot.parts]

    def drop(self) -> None:
        """Deactivate and forget every adapter."""
        self._resident.clear()
        for slot in self._slots.values():
            slot.parts = []

    def _slot(self, layer: Layer) -> _Slot:
        if layer not in self._slots:
            self._slots[layer] = _Slot()
            layer.register_forward_hook(self._slots[layer])
        return self._slots[layer]

    def _load(self, file: LoraFile, in_use: Collection[str]) -> Adapter:
        found = self._match(_read(file))
        deltas: dict[Layer, Delta] = {}
        for stem, (target, parts) in found.items():
            delta = build(stem, parts)
            if not target.layers:
                continue
            if not deltas.keys().isdisjoint(target.layers):
                raise unsupported(f"names a layer twice, at {shorten(stem)}")
            if not delta.fits(target.layers):
                raise JobFailure(FailureCode.LORA_NO_MATCH, _misfit(stem, delta, target.layers))
            pieces = delta.split([layer.weight.shape[0] for layer in target.layers])
            for layer, piece in zip(target.layers, pieces, strict=True):
                deltas[layer] = piece.to(torch.device("cpu"), layer.weight.dtype)
        if not deltas:
            message = f"The LoRA matches no layer of the model: {_some(found)}."
            raise JobFailure(FailureCode.LORA_NO_MATCH, message)
        weights = [tensor for delta in deltas.values() for tensor in delta.tensors]
        if not all(tensor.isfinite().all() for tensor in weights):
            raise unsupported("has weights that are infinite or no numbers")
        size = sum(tensor.nbytes for tensor in weights)
        self._make_room(size, in_use)
        placed = {layer: delta.to(self._device, layer.weight.dtype) for layer, delta in deltas.items()}
        return Adapter(placed, size, _warning(found))

    def _match(self, tensors: dict[str, Tensor]) -> _Found:
        found = self._find(tensors)
        unknown = {
            stem
            for stem, (target, _) in found.items()
            if target.component == self._targets.denoiser and not target.layers
        }
        if unknown:
            # Names of a model's original code, or of an older diffusers.
            foreign = {name: tensor for name, tensor in tensors.items() if stem_of(name) in unknown}
            ours = {name: tensor for name, tensor in tensors.items() if name not in foreign}
            found = self._find(ours | rename(self._pipeline, foreign))
        return found

    def _find(self, tensors: Mapping[str, Tensor]) -> _Found:
        # Sorted, for messages that stay the same: safetensors returns tensors in no fixed order.
        return {stem: (self._targets.find(stem), parts) for stem, parts in sorted(group(tensors).items())}

    def _make_room(self, size: int, in_use: Collection[str]) -> None:
        """Drop least recently used adapters until `size` bytes fit into the budget; never one in use."""
        held = sum(adapter.bytes for adapter in self._resident.values())
        for sha256 in [sha256 for sha256 in self._resident if sha256 not in in_use]:
            if held + size <= self._budget:
                break
            held -= self._resident.pop(sha256).bytes


def _read(file: LoraFile) -> dict[str, Tensor]:
    try:
        dialect_of(read_header(file.path))
        tensors = load(file.path.read_bytes())
        if digest(file.path) != file.sha256:
            message = "The LoRA file changed while it was read."
            raise JobFailure(FailureCode.LORA_NOT_FOUND, message, retry=True)
    except OSError as error:
        raise JobFailure(FailureCode.LORA_NOT_FOUND, "The LoRA file cannot be read.") from error
    except SafetensorError as error:
        raise unsupported("is not valid safetensors") from error
    return tensors


def _misfit(stem: str, delta: Delta, layers: Sequence[Layer]) -> str:
    matrices = " and ".join(str(list(tensor.shape)) for tensor in delta.tensors)
    weights = " and ".join(str(list(layer.weight.shape)) for layer in layers)
    return (
        f"The LoRA is for another model: its matrices {matrices} at {shorten(stem)} do not fit"
        f" the model's weights of shape {weights}."
    )


def _warning(found: _Found) -> str | None:
    """Say how many modules of the file match no layer, by component, with a few of their names."""
    total = Counter(target.component for target, _ in found.values())
    unmatched = {stem: target.component for stem, (target, _) in found.items() if not target.layers}
    if not unmatched:
        return None
    counts = [f"{count} of {total[name]} of {name}" for name, count in Counter(unmatched.values()).items()]
    return f"Modules of the LoRA that match no layer were left out ({', '.join(counts)}): {_some(unmatched)}."


def _some(stems: Collection[str]) -> str:
    shown = ", ".join(shorten(stem) for stem in list(stems)[:_EXAMPLES])
    return f"{shown} and {len(stems) - _EXAMPLES} more" if len(stems) > _EXAMPLES else shown
