"""Finds classes by the names that catalogue rows use for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from deployments.catalog.lazy import Lazy


def load_class(name: str | type[Any] | Lazy) -> Any:  # noqa: ANN401 - a class
    """Return the class that a row names by itself, lazily, by dotted name or by its name in diffusers."""
    if isinstance(name, Lazy):
        return name.load()
    if not isinstance(name, str):
        return name
    module, _, attribute = name.rpartition(".")
    return Lazy(module or "diffusers", attribute).load()


def with_parts_of(pipeline: Any, class_name: str) -> Any:  # noqa: ANN401 - any diffusers pipeline
    """Make a diffusers pipeline of another class from the same components and configuration."""
    pipeline_class = getattr(diffusers, class_name)
    available = {**pipeline.config, **pipeline.components}
    wanted = inspect.signature(pipeline_class.__init__).parameters.keys() & available.keys()
    return pipeline_class(**{name: available[name] for name in wanted})


def make_scheduler(class_name: str, config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any scheduler
    """Make a diffusers scheduler from its class name and configuration."""
    return getattr(diffusers, class_name)(**config)
