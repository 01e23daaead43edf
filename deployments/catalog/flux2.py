"""FLUX.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deployments.catalog.control_choices import main_in_front
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Part, Preview

if TYPE_CHECKING:
    from deployments.pipelines import flux2
else:
    flux2 = LazyModule("deployments.pipelines.flux2")

FLOW_UNSHIFTED: tuple[str, Mapping[str, Any]] = (
    "FlowMatchEulerDiscreteScheduler",
    MappingProxyType({"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}),
)
"""Uses the given sigmas unchanged."""

FLUX2_DEV = Checkpoint(repo="black-forest-labs/FLUX.2-dev", gated=True)

MISTRAL_3_1 = Checkpoint(repo="mistralai/Mistral-Small-3.1-24B-Instruct-2503", gated=True)
"""The trainer's text encoder for FLUX.2 [dev]; the weights in the model's own repository are version 3.2."""

FLUX2_REFERENCES = ControlImages(most=3, least_side=64, most_aspect=8)

MAIN_IN_FRONT = Preview(
    differs="`ctrl_img` replaces `ctrl_img_1`; the other numbered control images follow it.",
    fields={"control_images": replace(FLUX2_REFERENCES, choose=main_in_front)},
)

FLUX2 = ModelSpec(
    id="flux2",
    family="flux2",
    title="FLUX.2 [dev]",
    pipeline="Flux2Pipeline",
    checkpoint=FLUX2_DEV,
    parts={
        "text_encoder": Part(
            class_name="transformers.Mistral3ForConditionalGeneration", checkpoint=MISTRAL_3_1
        ),
        # Only the tokenizer: a processor would require torchvision and never see a picture.
        "tokenizer": Part(class_name="transformers.AutoTokenizer", checkpoint=MISTRAL_3_1),
    },
    scheduler=FLOW_UNSHIFTED,
    adjust=flux2.adjust_dev,
    arguments=flux2.dev_arguments,
    steps=25,
    guidance=4.0,
    divisor=16,
    negative_prompt=False,
    control_images=FLUX2_REFERENCES,
    memory_gib={"transformer": 60.0, "text_encoder": 44.7, "vae": 0.16},
    licence="FLUX Non-Commercial",
    preview=MAIN_IN_FRONT,
)

ROWS = (
    ModelSpec(
        id="flux2_klein_4b",
        family="flux2",
        title="FLUX.2 [klein] Base 4B",
        pipeline="Flux2KleinPipeline",
        checkpoint=Checkpoint(repo="black-forest-labs/FLUX.2-klein-base-4B"),
        scheduler=FLOW_UNSHIFTED,
        # If this were true, diffusers would silently skip guidance.
        load_options={"is_distilled": False},
        adjust=flux2.round_references,
        arguments=flux2.klein_arguments,
        steps=25,
        guidance=4.0,
        divisor=16,
        control_images=FLUX2_REFERENCES,
        memory_gib={"transformer": 7.2, "text_encoder": 7.5, "vae": 0.16},
        licence="Apache-2.0",
        preview=MAIN_IN_FRONT,
    ),
    ModelSpec(
        id="flux2_klein_9b",
        family="flux2",
        title="FLUX.2 [klein] Base 9B",
        pipeline="Flux2KleinPipeline",
        checkpoint=Checkpoint(repo="black-forest-labs/FLUX.2-klein-base-9B", gated=True),
        scheduler=FLOW_UNSHIFTED,
        load_options={"is_distilled": False},
        adjust=flux2.round_references,
        arguments=flux2.klein_arguments,
        steps=25,
        guidance=4.0,
        divisor=16,
        control_images=FLUX2_REFERENCES,
        memory_gib={"transformer": 16.9, "text_encoder": 15.3, "vae": 0.16},
        licence="FLUX Non-Commercial",
        preview=MAIN_IN_FRONT,
    ),
    FLUX2,
    ModelSpec(
        id="flux2_diffusers",
        family="flux2",
        title="FLUX.2 [dev], as diffusers has it",
        pipeline="Flux2Pipeline",
        checkpoint=FLUX2_DEV,
        parts={
            "tokenizer": Part(
                class_name="transformers.AutoTokenizer", checkpoint=FLUX2_DEV, folder="tokenizer"
            ),
        },
        adjust=flux2.complete_tokenizer,
        steps=25,
        guidance=4.0,
        divisor=32,
        negative_prompt=False,
        memory_gib={"transformer": 60.0, "text_encoder": 44.7, "vae": 0.16},
        licence="FLUX Non-Commercial",
        preview=Preview(
            differs="It is `flux2`'s preview, and `flux2` renders it: the trainer has no other FLUX.2 [dev].",
            fields={field.name: getattr(FLUX2.sampled("preview"), field.name) for field in fields(FLUX2)},
        ),
    ),
)
