"""Schedules that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FLUX_SCHEDULE: tuple[str, Mapping[str, Any]] = (
    "FlowMatchEulerDiscreteScheduler",
    MappingProxyType(
        {
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        }
    ),
)
"""FLUX.1's schedule, with a shift by the picture's size; the trainer uses it for all models of this kind."""
