"""Classes and functions by the names that the catalogue has for them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from deployments.catalog import ModelSpec


def named(path: str) -> Any:  # noqa: ANN401 - a class or a function
    """Return what a dotted name means."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def pipeline_class(name: str) -> Any:  # noqa: ANN401 - a class
    """Return a pipeline's class: of diffusers, or of ours with its module in front."""
    return named(name if "." in name else f"diffusers.{name}")


def with_parts_of(pipeline: Any, class_name: str) -> Any:  # noqa: ANN401 - any diffusers pipeline
    """Make another pipeline of the same components and configuration."""
    pipeline_class = getattr(diffusers, class_name)
    held = {**pipeline.config, **pipeline.components}
    wanted = inspect.signature(pipeline_class.__init__).parameters.keys() & held.keys()
    return pipeline_class(**{name: held[name] for name in wanted})


def make_scheduler(class_name: str, config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any scheduler
    """Make a scheduler of a class of diffusers."""
    return getattr(diffusers, class_name)(**config)


def family_function(spec: ModelSpec, name: str) -> Callable[..., Any]:
    """Return the function of `pipelines` that a row names: in its family's module unless it is dotted."""
    return named(f"deployments.pipelines.{name if '.' in name else f'{spec.family}.{name}'}")
