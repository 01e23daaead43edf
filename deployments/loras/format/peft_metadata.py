"""The alphas in a file's metadata: of the LoRA configuration that diffusers and peft write, above all.

A file with `.alpha` tensors has none, and most files of trainers have neither: alpha is then the rank.
Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.loras.format.header import shorten, unsupported
from deployments.loras.format.peft_folder import METADATA

_COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2")

_OF_MINIMAX_H3 = re.compile(r"(.*[._])?blocks[._]\d+[._]attn[._]qkv_proj")


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


def stated_scales(metadata: Mapping[str, str], stems: Collection[str]) -> Scales:
    """Read the metadata of a file with the modules `stems`.

    Of files for MiniMax-H3, as diffusers does, also a plain "alpha": turbo LoRAs have theirs there.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for a configuration that cannot be read, or of
    anything but a LoRA.
    """
    if METADATA not in metadata:
        return Scales({"": {"lora_alpha": _number(metadata.get("alpha", ""))}} if _are_of_h3(stems) else {})
    try:
        entries = json.loads(metadata[METADATA])
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
    kinds = {str(config.get("peft_type") or "LORA") for config in configs.values()}
    if other := sorted(kinds - {"LORA"}):
        raise unsupported(f"is a {shorten(other[0])} of peft's, which is not supported")
    return Scales(configs)


def _are_of_h3(stems: Collection[str]) -> bool:
    return any(_OF_MINIMAX_H3.fullmatch(stem) for stem in stems)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _alpha(config: Mapping[str, Any], path: str) -> float | None:
    """Return the alpha of the module at `path`: of the pattern that names it, else of all."""
    patterns = config.get("alpha_pattern")
    named = patterns.items() if isinstance(patterns, dict) else ()
    matching = (alpha for name, alpha in named if f".{path}".endswith(f".{name}"))
    match next(matching, config.get("lora_alpha")):
        case int() | float() as alpha if math.isfinite(alpha):
            return float(alpha)
    return None
