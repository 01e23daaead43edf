"""Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ModelSpec, Part, Preview

if TYPE_CHECKING:
    from deployments.pipelines import zimage
else:
    zimage = LazyModule("deployments.pipelines.zimage")

FLOW_SHIFT_3: tuple[str, Mapping[str, Any]] = (
    "FlowMatchEulerDiscreteScheduler",
    MappingProxyType({"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}),
)
"""The trainer's schedule for Z-Image, in training and sampling; the repository's own is ignored."""

LESS_GUIDANCE = Preview(
    differs="Guidance is one less than requested. Sizes are multiples of 16.",
    fields={"divisor": 16, "arguments": zimage.preview_arguments},
)

ROWS = (
    ModelSpec(
        id="zimage",
        family="zimage",
        title="Z-Image",
        pipeline="ZImagePipeline",
        checkpoint=Checkpoint(repo="Tongyi-MAI/Z-Image"),
        scheduler=FLOW_SHIFT_3,
        steps=30,
        guidance=4.0,
        divisor=32,
        memory_gib={"transformer": 11.5, "text_encoder": 7.5, "vae": 0.16},
        licence="Apache-2.0",
        preview=LESS_GUIDANCE,
    ),
    ModelSpec(
        id="zimage_turbo",
        family="zimage",
        title="Z-Image Turbo",
        pipeline="ZImagePipeline",
        checkpoint=Checkpoint(repo="Tongyi-MAI/Z-Image-Turbo"),
        steps=8,
        guidance=1.0,
        divisor=32,
        memory_gib={"transformer": 11.5, "text_encoder": 7.5, "vae": 0.16},
        licence="Apache-2.0",
        preview=LESS_GUIDANCE,
    ),
    ModelSpec(
        id="zimage_deturbo",
        family="zimage",
        title="Z-Image De-Turbo",
        pipeline="ZImagePipeline",
        checkpoint=Checkpoint(repo="Tongyi-MAI/Z-Image-Turbo"),
        parts={
            "transformer": Part(
                class_name="diffusers.ZImageTransformer2DModel",
                checkpoint=Checkpoint(repo="ostris/Z-Image-De-Turbo"),
                folder="transformer",
            )
        },
        scheduler=FLOW_SHIFT_3,
        steps=25,
        guidance=3.0,
        divisor=32,
        memory_gib={"transformer": 11.5, "text_encoder": 7.5, "vae": 0.16},
        licence="Apache-2.0",
        preview=LESS_GUIDANCE,
    ),
)
