"""The LoRA adapters on one pipeline: which are resident, and which are active with what multiplier.

An adapter never touches the model's weights or module tree, as peft's wrappers would. Each layer that some
adapter changes gets one forward hook, once, which adds the active adapters' deltas to the layer's output.
So a switch is a new list per layer, a multiplier holds for one job only, several adapters add up, LoRA and
LoKr meet on one layer, a failed load leaves nothing behind, and offload hooks stay in place. The arithmetic
is peft's own: `base(x) + up(down(x)) * scale`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cluster.jobs import FailureCode, JobFailure
from deployments.loras.by_head import sort_by_projection
from deployments.loras.deltas import Delta, Layer, build
from deployments.loras.dialects import group
from deployments.loras.header import read_header, shorten, unsupported
from deployments.loras.modules import Contents, Module, judge
from deployments.loras.references import LoraFile, digest
from deployments.loras.targets import Layout, Shape, Target, Targets

_EXAMPLES = 3

_Key: TypeAlias = tuple[str, str | None]
"""A file's sha256, and the expert that it is for."""


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
    """Adapters of one pipeline by the sha256 of their file and the expert that it is for.

    `experts` are the components by their names in requests, where a pipeline has two transformers. `budget`
    bounds the adapters' bytes: the least recently used go.
    """

    def __init__(
        self,
        pipeline: Any,  # noqa: ANN401 - any pipeline
        device: torch.device,
        budget: int,
        experts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._device = device
        self._budget = budget
        self._experts = experts
        self._layers = _layers_of(pipeline)
        self._targets = Targets(_layout(self._layers))
        self._resident: OrderedDict[_Key, Adapter] = OrderedDict()
        self._slots: dict[Layer, _Slot] = {}
        self._active: Sequence[tuple[LoraFile, float]] = ()

    @property
    def resident(self) -> frozenset[str]:
        """The sha256 of each resident adapter."""
        return frozenset(sha256 for sha256, _ in self._resident)

    def activate(self, wanted: Sequence[tuple[LoraFile, float]]) -> list[str]:
        """Make exactly these adapters active, each with its multiplier; returns warnings.

        A resident adapter is taken as it is, without looking at its file. Raises `JobFailure`
        (LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, LORA_NOT_FOUND), and what was active stays so.
        """
        in_use = dict.fromkeys(_key(file) for file, _ in wanted)
        for file, _ in wanted:
            if _key(file) not in self._resident:
                self._resident[_key(file)] = self._load(file, in_use)
            self._resident.move_to_end(_key(file))
        for slot in self._slots.values():
            slot.parts = []
        for file, multiplier in wanted:
            for layer, delta in self._resident[_key(file)].deltas.items():
                self._slot(layer).parts.append((delta, multiplier * delta.scale))
        self._active = tuple(wanted)
        self._make_room(0, in_use)
        return [warning for key in in_use if (warning := self._resident[key].warning)]

    def form_products(self, *, in_file_dtype: bool) -> None:
        """Let the active LoRAs round their products to their file's dtype, or not."""
        for slot in self._slots.values():
            slot.parts = [(delta.formed(in_file_dtype=in_file_dtype), factor) for delta, factor in slot.parts]

    @contextmanager
    def joined_by(self, file: LoraFile, multiplier: float) -> Iterator[None]:
        """Make one more adapter active beside those that are, for a while. Raises as `activate`."""
        active = self._active
        self.activate([*active, (file, multiplier)])
        try:
            yield
        finally:
            self.activate(active)

    def drop(self) -> None:
        """Deactivate and forget every adapter."""
        self._active = ()
        self._resident.clear()
        for slot in self._slots.values():
            slot.parts = []

    def _slot(self, layer: Layer) -> _Slot:
        if layer not in self._slots:
            self._slots[layer] = _Slot()
            layer.register_forward_hook(self._slots[layer])
        return self._slots[layer]

    def _load(self, file: LoraFile, in_use: Collection[_Key]) -> Adapter:
        contents, tensors = _read(file)
        expert = self._experts[file.expert] if file.expert else None
        targets = {stem: self._targets.find(stem, expert) for stem in contents.modules}
        deltas: dict[Layer, Delta] = {}
        for stem, parts in group(tensors).items():
            target, module = targets[stem], contents.modules[stem]
            layers = [self._layers[target.component, path] for path in target.layers]
            if not layers:
                continue
            if not deltas.keys().isdisjoint(layers):
                raise unsupported(f"names a layer twice, at {shorten(stem)}")
            shapes = [tuple(layer.weight.shape) for layer in layers]
            if not module.fits(shapes):
                raise JobFailure(FailureCode.LORA_NO_MATCH, _misfit(stem, module, shapes))
            delta = build(module, parts)
            pieces = (delta.swap() if target.swapped else delta).split([shape[0] for shape in shapes])
            for layer, piece in zip(layers, pieces, strict=True):
                deltas[layer] = piece.to(torch.device("cpu"), layer.weight.dtype)
        if not deltas:
            message = f"The LoRA matches no layer of the model: {_some(targets)}."
            raise JobFailure(FailureCode.LORA_NO_MATCH, message)
        weights = [tensor for delta in deltas.values() for tensor in delta.tensors]
        if not all(tensor.isfinite().all() for tensor in weights):
            raise unsupported("has weights that are infinite or no numbers")
        size = sum(tensor.nbytes for tensor in weights)
        self._make_room(size, in_use)
        placed = {layer: delta.to(self._device, layer.weight.dtype) for layer, delta in deltas.items()}
        return Adapter(placed, size, _warning(targets))

    def _make_room(self, size: int, in_use: Collection[_Key]) -> None:
        """Drop least recently used adapters until `size` bytes fit into the budget; never one in use."""
        held = sum(adapter.bytes for adapter in self._resident.values())
        for key in [key for key in self._resident if key not in in_use]:
            if held + size <= self._budget:
                break
            held -= self._resident.pop(key).bytes


def _key(file: LoraFile) -> _Key:
    return file.sha256, file.expert


def _read(file: LoraFile) -> tuple[Contents, dict[str, Tensor]]:
    try:
        contents = judge(read_header(file.path))
        tensors = load(file.path.read_bytes())
        if digest(file.path) != file.sha256:
            message = "The LoRA file changed while it was read."
            raise JobFailure(FailureCode.LORA_NOT_FOUND, message, retry=True)
    except OSError as error:
        raise JobFailure(FailureCode.LORA_NOT_FOUND, "The LoRA file cannot be read.") from error
    except SafetensorError as error:
        raise unsupported("is not valid safetensors") from error
    return contents, sort_by_projection(tensors)


def _layers_of(pipeline: Any) -> dict[tuple[str, str], Layer]:  # noqa: ANN401 - any pipeline
    """Return the linear and convolution layers by component and path."""
    return {
        (name, path): layer
        for name, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module)
        for path, layer in model.named_modules()
        if isinstance(layer, Layer)
    }


def _layout(layers: Mapping[tuple[str, str], Layer]) -> Layout:
    layout: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for (component, path), layer in layers.items():
        layout[component][path] = tuple(layer.weight.shape)
    return layout


def _misfit(stem: str, module: Module, shapes: Sequence[Shape]) -> str:
    weights = " and ".join(str(list(shape)) for shape in shapes)
    return (
        f"The LoRA is for another model: its module {shorten(stem)} is for weights of shape"
        f" {[module.out, *module.inputs]}, the model's are {weights}."
    )


def _warning(targets: Mapping[str, Target]) -> str | None:
    """Say how many modules of the file match no layer, by component, with a few of their names."""
    total = Counter(target.component for target in targets.values())
    unmatched = {
        stem: target.component
        for stem, target in targets.items()
        if not target.layers and not target.without_effect
    }
    if not unmatched:
        return None
    counts = [f"{count} of {total[name]} of {name}" for name, count in Counter(unmatched.values()).items()]
    return f"Modules of the LoRA that match no layer were left out ({', '.join(counts)}): {_some(unmatched)}."


def _some(stems: Collection[str]) -> str:
    shown = ", ".join(shorten(stem) for stem in list(stems)[:_EXAMPLES])
    return f"{shown} and {len(stems) - _EXAMPLES} more" if len(stems) > _EXAMPLES else shown
