"""FLUX.1 and Flex."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.catalog.control_choices import first
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Preview
from deployments.catalog.schedules import FLUX_SCHEDULE

if TYPE_CHECKING:
    from deployments.pipelines import flux
else:
    flux = LazyModule("deployments.pipelines.flux")

ROWS = (
    ModelSpec(
        id="flux",
        family="flux",
        title="FLUX.1 [dev]",
        pipeline="FluxPipeline",
        checkpoint=Checkpoint(repo="black-forest-labs/FLUX.1-dev", gated=True),
        steps=25,
        guidance=4.0,
        divisor=16,
        negative_prompt=False,
        memory_gib={"transformer": 22.2, "text_encoder_2": 8.9, "text_encoder": 0.2, "vae": 0.16},
        licence="FLUX.1 [dev] Non-Commercial",
    ),
    ModelSpec(
        id="flux_kontext",
        family="flux",
        title="FLUX.1 Kontext [dev]",
        pipeline="FluxKontextPipeline",
        checkpoint=Checkpoint(repo="black-forest-labs/FLUX.1-Kontext-dev", gated=True),
        steps=25,
        guidance=4.0,
        divisor=16,
        negative_prompt=False,
        control_images=ControlImages(least=1, most=1),
        arguments=flux.edit_arguments,
        memory_gib={"transformer": 22.2, "text_encoder_2": 8.9, "text_encoder": 0.2, "vae": 0.16},
        licence="FLUX.1 [dev] Non-Commercial",
        preview=Preview(
            differs="`ctrl_img` wins over the numbered control images. For sizes that are not multiples of"
            " 16, it is resized twice.",
            fields={"divisor": 8, "control_images": ControlImages(least=1, most=1, choose=first)},
        ),
    ),
    ModelSpec(
        id="flex1",
        family="flux",
        title="Flex.1 [alpha]",
        pipeline="FluxPipeline",
        checkpoint=Checkpoint(repo="ostris/Flex.1-alpha"),
        scheduler=FLUX_SCHEDULE,
        steps=25,
        guidance=4.0,
        divisor=16,
        negative_prompt=False,
        memory_gib={"transformer": 15.2, "text_encoder_2": 8.9, "text_encoder": 0.2, "vae": 0.16},
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="flex2",
        family="flux",
        title="Flex.2 [preview]",
        pipeline="FluxPipeline",
        checkpoint=Checkpoint(repo="ostris/Flex.2-preview"),
        scheduler=FLUX_SCHEDULE,
        adjust=flux.feed_flex2,
        steps=25,
        guidance=4.0,
        divisor=32,
        negative_prompt=False,
        memory_gib={"transformer": 15.2, "text_encoder_2": 8.9, "text_encoder": 0.2, "vae": 0.16},
        licence="Apache-2.0",
        preview=Preview(differs="Sizes are multiples of 16.", fields={"divisor": 16}),
    ),
)
