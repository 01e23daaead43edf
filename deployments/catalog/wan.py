"""Wan 2.1 and 2.2: videos."""

from __future__ import annotations

from deployments.catalog.spec import Checkpoint, ModelSpec, Video

ROWS = (
    ModelSpec(
        id="wan21_1b",
        family="wan",
        title="Wan 2.1 1.3B",
        pipeline="WanPipeline",
        checkpoint=Checkpoint(repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        video=Video(multiples_go_up=True),
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib={"text_encoder": 10.6, "transformer": 2.6, "vae": 0.24},
        licence="Apache-2.0",
    ),
)
