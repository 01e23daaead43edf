"""The layer shapes of the real models, without weights. A gateway checks LoRAs against them.

`layouts.json` is written by `deployments.loras.adapters.architectures`. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import product

from deployments.loras.format.layer_names import Layout, Targets

_RANGE = re.compile(r"\{(\d+)\}")


@cache
def layouts() -> Mapping[str, Layout]:
    """Return the layout of each model id that has one."""
    text = files("deployments.loras.format").joinpath("layouts.json").read_text(encoding="utf-8")
    found: dict[str, Layout] = {}
    for entry in json.loads(text):
        components = {
            name: {path: tuple(shape) for pattern, shape in patterns.items() for path in _expand(pattern)}
            for name, patterns in entry["components"].items()
        }
        found |= dict.fromkeys(entry["models"], components)
    return found


@cache
def targets_of(model: str) -> Targets:
    """Return the layers of a model by name. Raises `KeyError` for an id without a layout."""
    return Targets(layouts()[model])


def _expand(pattern: str) -> Iterator[str]:
    """Yield the paths of a pattern, in which `{N}` stands for each number below N."""
    pieces = _RANGE.split(pattern)
    for numbers in product(*(range(int(end)) for end in pieces[1::2])):
        yield "".join(a + b for a, b in zip(pieces[::2], [*map(str, numbers), ""], strict=True))
