"""Converts a LoRA file to an adapter for one pipeline, in host memory: reads, matches, converts, checks."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cluster.failures import FailureCode, JobFailure
from deployments.loras.adapters.layer_deltas import Delta, Layer, build
from deployments.loras.adapters.packed_adapter import LayerName, Packed, pack
from deployments.loras.adapters.projections_by_head import sort_by_projection
from deployments.loras.format.dialects import group
from deployments.loras.format.file_modules import Contents, Module, judge
from deployments.loras.format.header import read_header, shorten, unsupported
from deployments.loras.format.layer_names import Layout, Shape, Target, Targets
from deployments.loras.sources.lora_file import LoraFile, digest

_EXAMPLES = 3

_WAN_21_IMAGE_MODULES = re.compile(r"cross_attn[._](k|v)_img$|attn2[._]add_(k|v)_proj$|img_emb[._]")


def layers_of(pipeline: Any) -> dict[LayerName, Layer]:  # noqa: ANN401 - any pipeline
    """Return the linear and convolution layers of a pipeline, by component and path."""
    return {
        (name, path): layer
        for name, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module)
        for path, layer in model.named_modules()
        if isinstance(layer, Layer)
    }


class Converter:
    """Converts files for the pipeline with these layers. Never changes the layers, so it is thread-safe.

    `experts` maps the names of a pipeline's two transformers in requests to components. `pinned` adapters are
    in page-locked memory, which needs CUDA.
    """

    def __init__(
        self,
        layers: Mapping[LayerName, Layer],
        experts: Mapping[str, str] = MappingProxyType({}),
        *,
        pinned: bool,
    ) -> None:
        self._shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        self._dtypes = {name: layer.weight.dtype for name, layer in layers.items()}
        self._targets = Targets(_layout(self._shapes))
        self._experts = experts
        self._pinned = pinned

    def __call__(self, file: LoraFile) -> Packed:
        """Convert a file.

        Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, LORA_NOT_FOUND).
        """
        contents, tensors = _read(file)
        expert = self._experts[file.expert] if file.expert else None
        targets = {stem: self._targets.find(stem, expert) for stem in contents.modules}
        deltas: dict[LayerName, Delta] = {}
        for stem, parts in group(tensors).items():
            target, module = targets[stem], contents.modules[stem]
            names = [(target.component, path) for path in target.layers]
            if not names:
                continue
            if not deltas.keys().isdisjoint(names):
                raise unsupported(f"changes a layer twice, at {shorten(stem)}")
            shapes = [self._shapes[name] for name in names]
            if not module.fits(shapes):
                raise JobFailure(FailureCode.LORA_NO_MATCH, _misfit(stem, module, shapes))
            delta = build(module, parts)
            pieces = (delta.swap() if target.swapped else delta).split([shape[0] for shape in shapes])
            deltas |= zip(names, pieces, strict=True)
        if not deltas:
            message = f"The LoRA matches no layer of the model. Its modules are {_some(targets)}."
            raise JobFailure(FailureCode.LORA_NO_MATCH, message)
        packed = pack(deltas, self._dtypes, _warning(targets), pinned=self._pinned)
        # Checked after the conversion, because a large number in the file may overflow in the model's dtype.
        if not all(_is_finite(tensor) for delta in packed.deltas.values() for tensor in delta.tensors):
            raise unsupported("has weights that are infinite or NaN")
        return packed


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


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, by minimum and maximum (NaN if any is): 35 times faster."""
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor))


def _layout(shapes: Mapping[LayerName, Shape]) -> Layout:
    layout: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for (component, path), shape in shapes.items():
        layout[component][path] = shape
    return layout


def _misfit(stem: str, module: Module, shapes: Sequence[Shape]) -> str:
    weights = " and ".join(str(list(shape)) for shape in shapes)
    return (
        f"The LoRA is for another model: its module {shorten(stem)} needs weights of shape"
        f" {[module.out, *module.inputs]}, but the model has {weights}."
    )


def _warning(targets: Mapping[str, Target]) -> str | None:
    """Count the modules that match no layer, by component, with a few names. None if all match."""
    total = Counter(target.component for target in targets.values())
    unmatched = {
        stem: target.component
        for stem, target in targets.items()
        if not target.layers and not target.without_effect
    }
    if not unmatched:
        return None
    counts = [f"{count} of {total[name]} in {name}" for name, count in Counter(unmatched.values()).items()]
    cause = ""
    if all(_WAN_21_IMAGE_MODULES.search(stem) for stem in unmatched):
        cause = " It was trained for image to video with Wan 2.1, the only model with these layers."
    summary = f"{', '.join(counts)}): {_some(unmatched)}"
    return f"The LoRA was used without the modules that match no layer ({summary}.{cause}"


def _some(stems: Collection[str]) -> str:
    shown = ", ".join(shorten(stem) for stem in list(stems)[:_EXAMPLES])
    return f"{shown} and {len(stems) - _EXAMPLES} more" if len(stems) > _EXAMPLES else shown
