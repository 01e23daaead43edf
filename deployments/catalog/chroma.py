"""Chroma."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ModelSpec, Preview
from deployments.catalog.schedules import FLUX_SCHEDULE

if TYPE_CHECKING:
    from deployments.pipelines import chroma
else:
    chroma = LazyModule("deployments.pipelines.chroma")

ROWS = (
    ModelSpec(
        id="chroma",
        family="chroma",
        title="Chroma1 Base",
        pipeline="ChromaPipeline",
        checkpoint=Checkpoint(repo="lodestones/Chroma1-Base"),
        scheduler=FLUX_SCHEDULE,
        adjust=chroma.correct_norms,
        arguments=chroma.text_arguments,
        steps=25,
        guidance=4.0,
        divisor=32,
        # The pipeline always guides away from the empty text and ignores a negative prompt.
        negative_prompt=False,
        memory_gib={"transformer": 16.6, "text_encoder": 8.9, "vae": 0.16},
        licence="Apache-2.0",
        preview=Preview(
            differs="It guides away from the negative prompt. Sizes are multiples of 16.",
            fields={"divisor": 16, "arguments": chroma.preview_arguments},
        ),
    ),
)
