"""One frozen row per model id: everything about a model that is data. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A repository in diffusers layout; `variant` names the file variant that the reference loads."""

    repo: str
    revision: str = "main"
    variant: str | None = None
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A component loaded apart from the others: its class as `library.Class`, its folder there ("" is the top)."""

    class_name: str
    checkpoint: Checkpoint
    folder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImages:
    """How many control images a prompt takes, and of what shape.

    With `most` 0, images sent are ignored, with a warning. `least_side` is in pixels; the longer side is at
    most `most_aspect` times the shorter.
    """

    least: int = 0
    most: int = 0
    least_side: int = 1
    most_aspect: int | None = None

    def take(self, size: tuple[int, int]) -> bool:
        """Whether an image of this size in pixels has a shape that the model takes."""
        short, long = sorted(size)
        return short >= self.least_side and (self.most_aspect is None or long <= short * self.most_aspect)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model id.

    `pipeline` and the scheduler's class are diffusers class names; `scheduler` replaces the repository's own.
    `parts` are components from other repositories. Defaults are the reference server's: sizes in pixels,
    floored to `divisor` in requests. `guidance_argument` is what the pipeline's call names guidance; the
    negative prompt is passed where the call has one. `call_options` are passed to every call. `adjust` and
    `arguments` name functions of the family's module in `pipelines`: the first changes the loaded pipeline,
    the second adds arguments to its call.
    `memory_gib` is the size of each part in bfloat16. `licence` is the SPDX name or the licence's own.
    """

    id: str
    family: str
    title: str
    pipeline: str
    checkpoint: Checkpoint
    steps: int
    guidance: float
    divisor: int
    width: int = 1024
    height: int = 1024
    scheduler: tuple[str, Mapping[str, Any]] | None = None
    parts: Mapping[str, Part] = field(default_factory=lambda: MappingProxyType({}))
    load_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    call_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    guidance_argument: str = "guidance_scale"
    negative_prompt: bool = True
    control_images: ControlImages = ControlImages()
    adjust: str | None = None
    arguments: str | None = None
    memory_gib: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    licence: str = ""


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
"""FLUX.1's schedule, shifted by the picture's size: the trainer samples each model of this kind with it."""

FLOW_UNSHIFTED: tuple[str, Mapping[str, Any]] = (
    "FlowMatchEulerDiscreteScheduler",
    MappingProxyType({"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}),
)
"""Takes the sigmas that it is given as they are."""

FLOW_SHIFT_3: tuple[str, Mapping[str, Any]] = (
    "FlowMatchEulerDiscreteScheduler",
    MappingProxyType({"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}),
)
"""Z-Image's schedule as the trainer trains and samples it, whatever the repository says."""

FLOW_SHIFT_6: tuple[str, Mapping[str, Any]] = (
    "FlowMatchEulerDiscreteScheduler",
    MappingProxyType({"num_train_timesteps": 1000, "shift": 6.0, "use_dynamic_shifting": False}),
)
"""Lumina 2's schedule, whatever the repository says."""

TRAINER_DDPM: tuple[str, Mapping[str, Any]] = (
    "DDPMScheduler",
    MappingProxyType(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "prediction_type": "epsilon",
            "steps_offset": 0,
            "timestep_spacing": "leading",
        }
    ),
)
"""The trainer's `ddpm` sampler: stochastic, its noise comes from the prompt's own generator."""

FLUX2_DEV = Checkpoint(repo="black-forest-labs/FLUX.2-dev", gated=True)

MISTRAL_3_1 = Checkpoint(repo="mistralai/Mistral-Small-3.1-24B-Instruct-2503", gated=True)
"""FLUX.2 [dev]'s text encoder as the trainer has it; the repository's own weights are those of 3.2."""

FLUX2_REFERENCES = ControlImages(most=3, least_side=64, most_aspect=8)
LLAMA = Checkpoint(repo="unsloth/Meta-Llama-3.1-8B-Instruct")
"""HiDream's fourth text encoder."""

QWEN_IMAGE_GIB: Mapping[str, float] = MappingProxyType(
    {"transformer": 38.1, "text_encoder": 15.5, "vae": 0.24}
)

_ROWS = (
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
        arguments="edit_arguments",
        memory_gib={"transformer": 22.2, "text_encoder_2": 8.9, "text_encoder": 0.2, "vae": 0.16},
        licence="FLUX.1 [dev] Non-Commercial",
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
        adjust="feed_flex2",
        steps=25,
        guidance=4.0,
        divisor=32,
        negative_prompt=False,
        memory_gib={"transformer": 15.2, "text_encoder_2": 8.9, "text_encoder": 0.2, "vae": 0.16},
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="chroma",
        family="chroma",
        title="Chroma1 Base",
        pipeline="ChromaPipeline",
        checkpoint=Checkpoint(repo="lodestones/Chroma1-Base"),
        scheduler=FLUX_SCHEDULE,
        adjust="correct_norms",
        arguments="text_arguments",
        steps=25,
        guidance=4.0,
        divisor=32,
        # It guides away from the empty text, whatever is sent.
        negative_prompt=False,
        memory_gib={"transformer": 16.6, "text_encoder": 8.9, "vae": 0.16},
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="flux2_klein_4b",
        family="flux2",
        title="FLUX.2 [klein] Base 4B",
        pipeline="Flux2KleinPipeline",
        checkpoint=Checkpoint(repo="black-forest-labs/FLUX.2-klein-base-4B"),
        scheduler=FLOW_UNSHIFTED,
        # With a distilled model diffusers would silently leave out guidance.
        load_options={"is_distilled": False},
        arguments="klein_arguments",
        steps=25,
        guidance=4.0,
        divisor=16,
        control_images=FLUX2_REFERENCES,
        memory_gib={"transformer": 7.2, "text_encoder": 7.5, "vae": 0.16},
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="flux2_klein_9b",
        family="flux2",
        title="FLUX.2 [klein] Base 9B",
        pipeline="Flux2KleinPipeline",
        checkpoint=Checkpoint(repo="black-forest-labs/FLUX.2-klein-base-9B", gated=True),
        scheduler=FLOW_UNSHIFTED,
        load_options={"is_distilled": False},
        arguments="klein_arguments",
        steps=25,
        guidance=4.0,
        divisor=16,
        control_images=FLUX2_REFERENCES,
        memory_gib={"transformer": 16.9, "text_encoder": 15.3, "vae": 0.16},
        licence="FLUX Non-Commercial",
    ),
    ModelSpec(
        id="flux2",
        family="flux2",
        title="FLUX.2 [dev]",
        pipeline="Flux2Pipeline",
        checkpoint=FLUX2_DEV,
        parts={
            "text_encoder": Part(
                class_name="transformers.Mistral3ForConditionalGeneration", checkpoint=MISTRAL_3_1
            ),
            # A processor would ask for torchvision, and no picture goes through it.
            "tokenizer": Part(class_name="transformers.AutoTokenizer", checkpoint=MISTRAL_3_1),
        },
        scheduler=FLOW_UNSHIFTED,
        adjust="complete_tokenizer",
        arguments="dev_arguments",
        steps=25,
        guidance=4.0,
        divisor=16,
        negative_prompt=False,
        control_images=FLUX2_REFERENCES,
        memory_gib={"transformer": 60.0, "text_encoder": 44.7, "vae": 0.16},
        licence="FLUX Non-Commercial",
    ),
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
        adjust="complete_tokenizer",
        steps=25,
        guidance=4.0,
        divisor=32,
        negative_prompt=False,
        memory_gib={"transformer": 60.0, "text_encoder": 44.7, "vae": 0.16},
        licence="FLUX Non-Commercial",
    ),
    ModelSpec(
        id="sd15",
        family="sd",
        title="Stable Diffusion 1.5",
        pipeline="StableDiffusionPipeline",
        checkpoint=Checkpoint(repo="stable-diffusion-v1-5/stable-diffusion-v1-5", variant="fp16"),
        scheduler=TRAINER_DDPM,
        # The checker turns flagged pictures black; the trainer's previews have none.
        load_options={"safety_checker": None, "requires_safety_checker": False},
        steps=25,
        guidance=6.0,
        divisor=8,
        memory_gib={"unet": 1.6, "text_encoder": 0.23, "vae": 0.16},
        licence="CreativeML OpenRAIL-M",
    ),
    ModelSpec(
        id="sdxl",
        family="sd",
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        checkpoint=Checkpoint(repo="stabilityai/stable-diffusion-xl-base-1.0", variant="fp16"),
        scheduler=TRAINER_DDPM,
        load_options={"add_watermarker": False},
        steps=30,
        guidance=5.0,
        divisor=8,
        memory_gib={"unet": 4.8, "text_encoder_2": 1.29, "text_encoder": 0.23, "vae": 0.16},
        licence="CreativeML Open RAIL++-M",
    ),
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
    ),
    ModelSpec(
        id="qwen_image",
        family="qwen_image",
        title="Qwen-Image",
        pipeline="QwenImagePipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image"),
        guidance_argument="true_cfg_scale",
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="qwen_image_2512",
        family="qwen_image",
        title="Qwen-Image-2512",
        pipeline="QwenImagePipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-2512"),
        guidance_argument="true_cfg_scale",
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="qwen_image_edit",
        family="qwen_image",
        title="Qwen-Image-Edit",
        pipeline="QwenImageEditPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit"),
        load_options={"processor": None},
        adjust="use_own_processor",
        arguments="edit_arguments",
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=1, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="qwen_image_edit_plus",
        family="qwen_image",
        title="Qwen-Image-Edit-2509",
        pipeline="QwenImageEditPlusPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit-2509"),
        load_options={"processor": None},
        adjust="use_own_processor",
        arguments="edit_plus_arguments",
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=3, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
    ModelSpec(
        id="qwen_image_edit_plus_2511",
        family="qwen_image",
        title="Qwen-Image-Edit-2511",
        pipeline="QwenImageEditPlusPipeline",
        checkpoint=Checkpoint(repo="Qwen/Qwen-Image-Edit-2511"),
        load_options={"processor": None},
        adjust="use_own_processor",
        arguments="edit_plus_arguments",
        guidance_argument="true_cfg_scale",
        control_images=ControlImages(least=1, most=3, most_aspect=150),
        steps=25,
        guidance=4.0,
        divisor=32,
        memory_gib=QWEN_IMAGE_GIB,
        licence="Apache-2.0",
    ),
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
    ),
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
    ),
    ModelSpec(
        id="hidream",
        family="hidream",
        title="HiDream-I1 Full",
        pipeline="HiDreamImagePipeline",
        checkpoint=Checkpoint(repo="HiDream-ai/HiDream-I1-Full"),
        parts={
            "text_encoder_4": Part(class_name="transformers.LlamaForCausalLM", checkpoint=LLAMA),
            "tokenizer_4": Part(class_name="transformers.PreTrainedTokenizerFast", checkpoint=LLAMA),
        },
        adjust="complete",
        call_options={"max_sequence_length": 128},
        steps=50,
        guidance=5.0,
        divisor=16,
        memory_gib={
            "transformer": 31.9,
            "text_encoder_4": 15.0,
            "text_encoder_3": 8.9,
            "text_encoder_2": 1.3,
            "text_encoder": 0.2,
            "vae": 0.2,
        },
        licence="MIT",
    ),
)

CATALOG: Mapping[str, ModelSpec] = MappingProxyType({row.id: row for row in _ROWS})
"""Every model id that this service serves, in the order of the catalogue."""
