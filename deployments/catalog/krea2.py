"""Krea 2."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from deployments.catalog.control_choices import main_shown_twice
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Part, Preview

if TYPE_CHECKING:
    from deployments.pipelines import krea2, krea2_edit
else:
    krea2 = LazyModule("deployments.pipelines.krea2")
    krea2_edit = LazyModule("deployments.pipelines.krea2_edit")

RAW = Checkpoint(repo="krea/Krea-2-Raw", gated=True)
TURBO = Checkpoint(repo="krea/Krea-2-Turbo", gated=True)

TILED = Preview(
    differs="Pictures with a side above 256 pixels are decoded in tiles.",
    fields={"during": krea2.trainer_tiles},
)
"""The trainer decodes like this with `low_vram`, which its user interface sets for these models."""

EDIT_TRANSFORMER = krea2_edit.Krea2EditTransformer

EDIT_IMAGES = ControlImages(least=1, most=3, most_aspect=150)

EDIT_OPTIONS: Mapping[str, bool] = MappingProxyType({"kv_cache": True, "match_target_res": True})
"""What LoRAs are trained with since July 2026; older LoRAs need both off."""

EDIT_PREVIEW = Preview(
    differs="The noise does not depend on the control images. The text encoder sees `ctrl_img` besides"
    " `ctrl_img_1`, or twice if there is no `ctrl_img_1`. For the latents, `ctrl_img` replaces `ctrl_img_1`."
    " Pictures with a side above 256 pixels are decoded in tiles.",
    fields={
        "arguments": krea2_edit.edit_preview_arguments,
        "during": krea2.trainer_tiles,
        "control_images": ControlImages(least=1, most=4, most_aspect=150, choose=main_shown_twice),
    },
)

ROWS = (
    ModelSpec(
        id="krea2",
        family="krea2",
        title="Krea 2 Raw",
        pipeline="Krea2Pipeline",
        checkpoint=RAW,
        adjust=krea2.keep_state_in_float32,
        arguments=krea2.text_arguments,
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
        checkpoint=TURBO,
        # Otherwise diffusers would fix the size-dependent shift; trainer and reference do not.
        load_options={"is_distilled": False},
        adjust=krea2.keep_state_in_float32,
        arguments=krea2.text_arguments,
        steps=9,
        guidance=1.0,
        divisor=16,
        memory_gib={"transformer": 23.9, "text_encoder": 8.3, "vae": 0.24},
        licence="Krea 2 Licence",
        preview=TILED,
    ),
    ModelSpec(
        id="krea2_o_edit",
        family="krea2",
        title="Krea 2 Raw, editing",
        pipeline="Krea2Pipeline",
        checkpoint=RAW,
        parts={"transformer": Part(class_name=EDIT_TRANSFORMER, checkpoint=RAW, folder="transformer")},
        control_images=EDIT_IMAGES,
        options=EDIT_OPTIONS,
        adjust=krea2.keep_state_in_float32,
        arguments=krea2_edit.edit_arguments,
        steps=30,
        guidance=4.0,
        divisor=16,
        memory_gib={"transformer": 23.9, "text_encoder": 8.3, "vae": 0.24},
        licence="Krea 2 Licence",
        preview=EDIT_PREVIEW,
    ),
    ModelSpec(
        id="krea2_o_edit_turbo",
        family="krea2",
        title="Krea 2 Turbo, editing",
        pipeline="Krea2Pipeline",
        checkpoint=TURBO,
        parts={"transformer": Part(class_name=EDIT_TRANSFORMER, checkpoint=TURBO, folder="transformer")},
        load_options={"is_distilled": False},
        control_images=EDIT_IMAGES,
        options=EDIT_OPTIONS,
        adjust=krea2.keep_state_in_float32,
        arguments=krea2_edit.edit_arguments,
        steps=8,
        guidance=1.0,
        divisor=16,
        memory_gib={"transformer": 23.9, "text_encoder": 8.3, "vae": 0.24},
        licence="Krea 2 Licence",
        preview=EDIT_PREVIEW,
    ),
)
