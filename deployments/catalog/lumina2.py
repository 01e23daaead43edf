"""Lumina-Image 2.0."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ModelSpec, Preview

if TYPE_CHECKING:
    from deployments.pipelines import lumina2
else:
    lumina2 = LazyModule("deployments.pipelines.lumina2")

FLOW_SHIFT_6: tuple[str, Mapping[str, Any]] = (
    "FlowMatchEulerDiscreteScheduler",
    MappingProxyType({"num_train_timesteps": 1000, "shift": 6.0, "use_dynamic_shifting": False}),
)
"""Lumina 2's schedule; the repository's own is ignored."""

FLOW_SHIFT_1: tuple[str, Mapping[str, Any]] = (
    FLOW_SHIFT_6[0],
    MappingProxyType({**FLOW_SHIFT_6[1], "shift": 1.0}),
)
"""The schedule of previews: the trainer's scheduler ignores the shift in its config."""

ROWS = (
    ModelSpec(
        id="lumina2",
        family="lumina2",
        title="Lumina-Image 2.0",
        pipeline="Lumina2Pipeline",
        checkpoint=Checkpoint(repo="Alpha-VLLM/Lumina-Image-2.0"),
        scheduler=FLOW_SHIFT_6,
        call_options={"max_sequence_length": 256},
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib={"transformer": 4.9, "text_encoder": 4.9, "vae": 0.16},
        licence="Apache-2.0",
        preview=Preview(
            differs="The schedule's shift is 1 instead of 6. The negative prompt is encoded with the system"
            " prompt. Sizes are multiples of 16.",
            fields={"divisor": 16, "scheduler": FLOW_SHIFT_1, "arguments": lumina2.preview_arguments},
        ),
    ),
)
