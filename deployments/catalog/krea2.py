"""Krea 2."""

from __future__ import annotations

from deployments.catalog.spec import Checkpoint, ModelSpec, Preview

TILED = Preview(
    differs="Pictures with a side above 256 pixels are decoded in tiles.",
    fields={"during": "tiled_decode"},
)
"""As the trainer decodes with `low_vram`, which its user interface sets for these models."""

ROWS = (
    ModelSpec(
        id="krea2",
        family="krea2",
        title="Krea 2 Raw",
        pipeline="Krea2Pipeline",
        checkpoint=Checkpoint(repo="krea/Krea-2-Raw", gated=True),
        adjust="keep_state_in_float32",
        arguments="text_arguments",
        steps=30,
        guidance=4.0,
        divisor=16,
        memory_gib={"transformer": 23.9, "text_encoder": 8.3, "vae": 0.24},
        licence="Krea 2 Licence",
        preview=TILED,
    ),
    ModelSpec(
        id="krea2_turbo",
        family="krea2",
        title="Krea 2 Turbo",
        pipeline="Krea2Pipeline",
        checkpoint=Checkpoint(repo="krea/Krea-2-Turbo", gated=True),
        # Or diffusers would pin the shift that depends on the size; neither trainer nor reference does.
        load_options={"is_distilled": False},
        adjust="keep_state_in_float32",
        arguments="text_arguments",
        steps=9,
        guidance=1.0,
        divisor=16,
        memory_gib={"transformer": 23.9, "text_encoder": 8.3, "vae": 0.24},
        licence="Krea 2 Licence",
        preview=TILED,
    ),
)
