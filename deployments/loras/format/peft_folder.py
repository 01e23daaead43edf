"""PEFT folders: the weights in one file, and what trained them, alphas included, in another beside it."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the same configuration in a file of its own: a key of the metadata."""


def config_beside(weights: Path) -> Path | None:
    """Return the configuration that belongs to a file of weights: one in its folder, if peft named both."""
    config = weights.with_name(CONFIG)
    return config if weights.name == WEIGHTS and config.is_file() else None
