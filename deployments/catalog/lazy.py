"""Functions and classes that catalogue rows name; they are imported on first use.

A row writes `flux.edit_arguments`, which type checkers and editors follow to the function itself:

    if TYPE_CHECKING:
        from deployments.pipelines import flux
    else:
        flux = LazyModule("deployments.pipelines.flux")

At run time this gives a `Lazy`, so reading the catalogue imports neither torch nor diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Lazy:
    """A function or class whose module is imported when it is first called."""

    module: str
    name: str

    def load(self) -> Any:  # noqa: ANN401 - a function or a class
        """Import the module and return the function or class itself."""
        return getattr(import_module(self.module), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the function has them
        """Call the function, or make an instance of the class."""
        return self.load()(*args, **kwargs)


class LazyModule:
    """A module whose attributes are `Lazy`."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Lazy:
        return Lazy(self._module, name)
