"""Describes a LoRA file and which models it fits, from its header and alpha tensors. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel

from deployments.catalog import CATALOG
from deployments.loras.format.dialects import Dialect, Role
from deployments.loras.format.file_modules import Contents, Module, judge
from deployments.loras.format.header import Header, read_header, read_number, shorten
from deployments.loras.format.layouts import layouts, targets_of

_EXAMPLES = 3

_MAX_ENTRIES = 64

_MAX_CHARS = 500
"""Limit of one metadata entry. kohya's list every tag and folder of the training set."""


class Fit(StrEnum):
    """How a file fits a model."""

    WHOLE = "whole"
    """Every module matches layers of the model."""

    PART = "part"
    """Some modules match no layer. The model renders with the others and reports a warning."""

    NONE = "none"
    """The model refuses the file: no module matches, or a module is a misfit."""


class ModelFit(BaseModel):
    """How many modules of a file match the layers of a model.

    `unmatched` modules name no layer of the model. `misfits` name one of another shape, or one that another
    module changes too. `examples` are a few of both, quoted.
    """

    model: str
    fit: Fit
    matched: int
    unmatched: int
    misfits: int
    examples: list[str]


class Inspection(BaseModel):
    """A description of a LoRA file.

    - `dtypes` counts the tensors of each dtype.
    - `ranks` are the distinct ranks, ascending. A LoKr with whole factors has none.
    - `alphas` are the distinct alphas in tensors or metadata, ascending. If there are none, alpha is the
      rank, unless `alpha_tensors` (the number of modules with an alpha tensor) shows that they were not read.
    - `metadata` is the trainer's, cut to 64 entries of 500 characters.
    - `fitting_models` are the models that the whole file fits, else those that most of its modules fit.
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

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for a file that is not supported, and `OSError` if it
    cannot be read.
    """
    header = read_header(path)
    with path.open("rb") as file:
        # Alpha has no effect on a module without a rank.
        modules = [module for module in judge(header).modules.values() if module.rank]
        stored = [module.parts[Role.ALPHA] for module in modules if Role.ALPHA in module.parts]
        alphas = [read_number(file, tensor) for tensor in stored]
    return inspect(header, [alpha for alpha in alphas if alpha is not None and math.isfinite(alpha)])


def inspect(header: Header, alphas: Iterable[float] = ()) -> Inspection:
    """Inspect a header. `alphas` are the values of its alpha tensors, if read. Raises as `inspect_file`."""
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
        fits = module.fits([layout[target.component][path] for path in target.layers]) and not layers & seen
        seen.update(layers)
        return "matched" if fits else "misfits"

    verdicts = {stem: verdict(stem, module) for stem, module in contents.modules.items()}
    counts = Counter(verdicts.values())
    matched, unmatched, misfits = (counts[name] for name in ("matched", "unmatched", "misfits"))
    fit = Fit.NONE if misfits or not matched else Fit.PART if unmatched else Fit.WHOLE
    failing = [stem for stem, found in verdicts.items() if found != "matched"]
    return ModelFit(
        model=model,
        fit=fit,
        matched=matched,
        unmatched=unmatched,
        misfits=misfits,
        examples=[shorten(stem) for stem in failing[:_EXAMPLES]],
    )


def _fitting(models: Iterable[ModelFit]) -> list[str]:
    usable = [entry for entry in models if entry.fit is not Fit.NONE]
    most = max((entry.matched for entry in usable), default=0)
    return [entry.model for entry in usable if entry.matched == most]


def _bounded(metadata: Mapping[str, str]) -> dict[str, str]:
    entries = sorted(metadata.items())[:_MAX_ENTRIES]
    return {_cut(name): _cut(text) for name, text in entries}


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."
