"""Classes by the names that rows of the catalogue have for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from deployments.catalog.lazy import Lazy


def load_class(name: str | type[Any] | Lazy) -> Any:  # noqa: ANN401 - a class
    """Return the class that a row names: one of ours, a dotted name, or a class name of diffusers."""
    if isinstance(name, Lazy):
        return name.load()
    if not isinstance(name, str):
        return name
    module, _, attribute = name.rpartition(".")
    return Lazy(module or "diffusers", attribute).load()


def with_parts_of(pipeline: Any, class_name: str) -> Any:  # noqa: ANN401 - any diffusers pipeline
    """Make another pipeline of the same components and configuration."""
    pipeline_class = getattr(diffusers, class_name)
    held = {**pipeline.config, **pipeline.components}
    wanted = inspect.signature(pipeline_class.__init__).parameters.keys() & held.keys()
    return pipeline_class(**{name: held[name] for name in wanted})


def make_scheduler(class_name: str, config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any scheduler
    """Make a scheduler of a class of diffusers."""
    return getattr(diffusers, class_name)(**config)
