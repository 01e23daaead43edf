"""What a LoRA file is and which models it fits, from its header alone. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel

from deployments.catalog import CATALOG
from deployments.loras.format.dialects import Dialect, Role
from deployments.loras.format.header import Header, read_header, read_number, shorten
from deployments.loras.format.layouts import layouts, targets_of
from deployments.loras.format.modules import Contents, Module, judge

_EXAMPLES = 3

_MOST_ENTRIES = 64

_MOST_CHARS = 500
"""Of an entry of the metadata: kohya's have every tag and folder of the training set."""


class Fit(StrEnum):
    """How a file fits a model."""

    WHOLE = "whole"
    """Every module changes layers of the model."""

    PART = "part"
    """Some modules have no layer there; the model renders with the others, and warns."""

    NONE = "none"
    """The model refuses it: nothing matches, or a layer has another shape."""


class ModelFit(BaseModel):
    """How many modules of a file match the layers of a model.

    `unmatched` have no layer of such a name, `misfits` have one of another shape; `examples` are a few of
    both, quoted.
    """

    model: str
    fit: Fit
    matched: int
    unmatched: int
    misfits: int
    examples: list[str]


class Inspection(BaseModel):
    """What a LoRA file is.

    `dtypes` counts tensors. `ranks` are the different ones, ascending; a LoKr of whole factors has none.
    `alphas` are the different ones that the file states, in tensors or metadata; none means alpha is the
    rank, unless `alpha_tensors` (how many modules have one) says that they were not read. `metadata` is the
    trainer's own, cut to 64 entries of 500 characters. `fitting_models` are those that it fits as a whole;
    if there are none, those that most of it fits.
    """

    dialect: Dialect
    tensors: int
    modules: int
    dtypes: dict[str, int]
    ranks: list[int]
    alphas: list[float]
    alpha_tensors: int
    metadata: dict[str, str]
    models: list[ModelFit]
    fitting_models: list[str]


def inspect_file(path: Path) -> Inspection:
    """Inspect a file on this machine.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for a file that is not served, and `OSError` where it
    cannot be read.
    """
    header = read_header(path)
    with path.open("rb") as file:
        # Without a rank alpha means nothing.
        modules = [module for module in judge(header).modules.values() if module.rank]
        stored = [module.parts[Role.ALPHA] for module in modules if Role.ALPHA in module.parts]
        alphas = [read_number(file, tensor) for tensor in stored]
    return inspect(header, [alpha for alpha in alphas if alpha is not None and math.isfinite(alpha)])


def inspect(header: Header, alphas: Iterable[float] = ()) -> Inspection:
    """Inspect a header; `alphas` are those of its tensors, if they were read. Raises as `inspect_file`."""
    contents = judge(header)
    modules = contents.modules.values()
    models = [_fit(model, contents) for model in CATALOG if model in layouts()]
    stated = [module.scale * module.rank for module in modules if module.scale and module.rank]
    return Inspection(
        dialect=contents.dialect,
        tensors=len(header.tensors),
        modules=len(modules),
        dtypes=dict(Counter(tensor.dtype for tensor in header.tensors.values())),
        ranks=sorted({module.rank for module in modules if module.rank}),
        alphas=sorted({*alphas, *stated}),
        alpha_tensors=sum(Role.ALPHA in module.parts for module in modules),
        metadata=_bounded(header.metadata),
        models=models,
        fitting_models=_fitting(models),
    )


def _fit(model: str, contents: Contents) -> ModelFit:
    targets, layout = targets_of(model), layouts()[model]
    seen: set[tuple[str, str]] = set()

    def verdict(stem: str, module: Module) -> str:
        target = targets.find(stem)
        if target.without_effect:
            return "matched"
        layers = {(target.component, path) for path in target.layers}
        if not layers:
            return "unmatched"
        sound = module.fits([layout[target.component][path] for path in target.layers]) and not layers & seen
        seen.update(layers)
        return "matched" if sound else "misfits"

    verdicts = {stem: verdict(stem, module) for stem, module in contents.modules.items()}
    counts = Counter(verdicts.values())
    matched, unmatched, misfits = (counts[name] for name in ("matched", "unmatched", "misfits"))
    fit = Fit.NONE if misfits or not matched else Fit.PART if unmatched else Fit.WHOLE
    strange = [stem for stem, found in verdicts.items() if found != "matched"]
    return ModelFit(
        model=model,
        fit=fit,
        matched=matched,
        unmatched=unmatched,
        misfits=misfits,
        examples=[shorten(stem) for stem in strange[:_EXAMPLES]],
    )


def _fitting(models: Iterable[ModelFit]) -> list[str]:
    usable = [entry for entry in models if entry.fit is not Fit.NONE]
    most = max((entry.matched for entry in usable), default=0)
    return [entry.model for entry in usable if entry.matched == most]


def _bounded(metadata: Mapping[str, str]) -> dict[str, str]:
    entries = sorted(metadata.items())[:_MOST_ENTRIES]
    return {_cut(name): _cut(text) for name, text in entries}


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."
