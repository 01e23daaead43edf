"""The LoRA configuration that diffusers and peft write into a file's metadata: it has the alphas.

A file with `.alpha` tensors has none, and most files of trainers have neither: alpha is then the rank.
Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.loras.header import unsupported

_KEY = "lora_adapter_metadata"

_COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class Scales:
    """The factors that a file's metadata state; `configs` by component, "" for a file of one."""

    configs: Mapping[str, Mapping[str, Any]]

    def of(self, stem: str, rank: int | None) -> float | None:
        """Return the factor of the module `stem` of a file, or none where nothing is stated for it."""
        component, _, path = stem.partition(".")
        if component not in self.configs:
            component, path = "", stem
        config = self.configs.get(component, {})
        alpha = _alpha(config, path)
        if alpha is None or not rank:
            return None
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def stated_scales(metadata: Mapping[str, str]) -> Scales:
    """Read a file's metadata.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for a configuration that cannot be read, or of a DoRA.
    """
    if _KEY not in metadata:
        return Scales({})
    try:
        entries = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise unsupported("has a LoRA configuration in its metadata that is no JSON") from error
    if not isinstance(entries, dict):
        raise unsupported("has a LoRA configuration in its metadata that is no object")
    configs: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        component, _, key = name.partition(".")
        component, key = (component, key) if component in _COMPONENTS and key else ("", name)
        configs.setdefault(component, {})[key] = value
    if any(config.get("use_dora") for config in configs.values()):
        raise unsupported("is a DoRA, which is not supported")
    return Scales(configs)


def _alpha(config: Mapping[str, Any], path: str) -> float | None:
    """Return the alpha of the module at `path`: of the pattern that names it, else of all."""
    patterns = config.get("alpha_pattern")
    named = patterns.items() if isinstance(patterns, dict) else ()
    matching = (alpha for name, alpha in named if f".{path}".endswith(f".{name}"))
    match next(matching, config.get("lora_alpha")):
        case int() | float() as alpha if math.isfinite(alpha):
            return float(alpha)
    return None
