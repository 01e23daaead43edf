"""The alphas in a file's metadata, mainly in the LoRA configuration that diffusers and peft write.

A file with `.alpha` tensors has no such configuration. Most trainers write neither; alpha is then the rank.
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
    """The scales in a file's metadata. `configs` are by component, "" if the file has only one."""

    configs: Mapping[str, Mapping[str, Any]]

    def of(self, stem: str, rank: int | None) -> float | None:
        """Return the scale of the module `stem`, or None if the metadata have no alpha for it."""
        component, _, path = stem.partition(".")
        if component not in self.configs:
            component, path = "", stem
        config = self.configs.get(component, {})
        alpha = _alpha(config, path)
        if alpha is None or not rank:
            return None
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def stated_scales(metadata: Mapping[str, str], stems: Collection[str]) -> Scales:
    """Return the scales in the metadata of a file with the modules `stems`.

    For MiniMax-H3 a plain "alpha" entry counts too, as in diffusers, because turbo LoRAs have theirs there.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) if the configuration cannot be read or is not for a LoRA.
    """
    if METADATA not in metadata:
        return Scales(
            {"": {"lora_alpha": _number(metadata.get("alpha", ""))}} if _are_of_minimax_h3(stems) else {}
        )
    try:
        entries = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise unsupported(
            "has a LoRA configuration (metadata or adapter_config.json) that is not valid JSON"
        ) from error
    if not isinstance(entries, dict):
        raise unsupported(
            "has a LoRA configuration (metadata or adapter_config.json) that is not a JSON object"
        )
    configs: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        component, _, key = name.partition(".")
        component, key = (component, key) if component in _COMPONENTS and key else ("", name)
        configs.setdefault(component, {})[key] = value
    if any(config.get("use_dora") for config in configs.values()):
        raise unsupported("is a DoRA, which is not supported")
    kinds = {str(config.get("peft_type") or "LORA") for config in configs.values()}
    if other := sorted(kinds - {"LORA"}):
        raise unsupported(f"is a peft adapter of type {shorten(other[0])}, which is not supported")
    return Scales(configs)


def _are_of_minimax_h3(stems: Collection[str]) -> bool:
    return any(_OF_MINIMAX_H3.fullmatch(stem) for stem in stems)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _alpha(config: Mapping[str, Any], path: str) -> float | None:
    """Return the alpha of the module at `path`: the first pattern's that names it, else the default."""
    patterns = config.get("alpha_pattern")
    named = patterns.items() if isinstance(patterns, dict) else ()
    matching = (alpha for name, alpha in named if f".{path}".endswith(f".{name}"))
    match next(matching, config.get("lora_alpha")):
        case int() | float() as alpha if math.isfinite(alpha):
            return float(alpha)
    return None
