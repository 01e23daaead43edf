"""PEFT folders: one file with the weights, and one with the training configuration, alphas included."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

METADATA = "lora_adapter_metadata"
"""The metadata key under which diffusers stores the same configuration in a single file."""


def config_beside(weights: Path) -> Path | None:
    """Return the configuration file next to `weights` if both have peft's file names, else None."""
    config = weights.with_name(CONFIG)
    return config if weights.name == WEIGHTS and config.is_file() else None
