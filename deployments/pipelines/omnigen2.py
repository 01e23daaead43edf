"""OmniGen2: text to image, and editing with reference images. diffusers has no pipeline for it.

Time runs from 0 (noise) to 1 (image). Steps are shorter near the noise: they are diffusers' flow sigmas,
counted from the other end, with a shift that grows with the picture's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from deployments.pipelines.omnigen2_transformer import OmniGen2Transformer2DModel
from deployments.spec.job import PromptSpec

_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user"
    " instructions.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
)

_BILINEAR, _LANCZOS = Image.Resampling.BILINEAR, Image.Resampling.LANCZOS

_MAX_TOKENS = 256
"""Longest text in tokens, including the template."""

_MAX_PIXELS = 1024 * 1024
"""Largest area in pixels of a drawn picture and of a reference."""

_MAX_SIDE = 1024
"""Longest side of a reference in pixels."""

_STEP = 16
"""Sides of pictures are multiples of this: the VAE's factor 8 times patches of 2."""


class OmniGen2Pipeline(DiffusionPipeline):
    """A language model encodes the prompt, a transformer draws latents, and FLUX.1's VAE decodes them."""

    model_cpu_offload_seq = "mllm->transformer->vae"

    def __init__(self, mllm: Any, tokenizer: Any, transformer: Any, vae: Any, scheduler: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.register_modules(
            mllm=mllm, tokenizer=tokenizer, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=_STEP)
        self.num_timesteps = 0

    @classmethod
    def from_pretrained(cls, directory: Path, *, dtype: torch.dtype, **_: object) -> Self:  # type: ignore[override]
        """Load the parts folder by folder: the repository's index names classes that no library has.

        Keeps only the text part of the multimodal language model.
        """
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
        mllm = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory / "mllm", **options)
        return cls(
            mllm=mllm.model.language_model,
            tokenizer=AutoTokenizer.from_pretrained(directory / "processor", local_files_only=True),
            transformer=OmniGen2Transformer2DModel.from_pretrained(directory / "transformer", **options),
            vae=AutoencoderKL.from_pretrained(directory / "vae", **options),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
        images: Sequence[Image.Image],
        image_generator: torch.Generator,
        negative_prompt: str = "",
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], object] | None = None,
    ) -> ImagePipelineOutput:
        """Render a picture of `width` x `height` pixels. Above a megapixel, draw smaller, then enlarge.

        `images` are the references (RGB, sides of at least 16 pixels), and `image_generator` draws their
        latents. With `guidance_scale` above 1 the result is guided away from the negative prompt.
        """
        texts = [prompt, negative_prompt] if guidance_scale > 1 else [prompt]
        contexts = [self._read(text) for text in texts]
        references = [self._encode(image, image_generator) for image in images]

        scale = min(math.sqrt(_MAX_PIXELS / (width * height)), 1)
        rows, columns = (_floor(side * scale) // self._vae_factor for side in (height, width))
        shape = (1, self.transformer.config.in_channels, rows, columns)
        latents = torch.randn(shape, generator=generator, dtype=self.mllm.dtype).to(self._execution_device)
        self.scheduler.set_shift(math.sqrt(rows * columns) / 40)
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        self.num_timesteps = num_inference_steps
        for step, timestep in enumerate(self.scheduler.timesteps):
            # The published code rounds the time to the models' dtype.
            time = (1 - timestep / 1000).to(latents.dtype)[None]
            velocity, *negatives = (self.transformer(latents, time, text, references) for text in contexts)
            for negative in negatives:
                velocity = negative + guidance_scale * (velocity - negative)
            stepped = self.scheduler.step(-velocity.float(), timestep, latents, return_dict=False)[0]
            latents = stepped.to(latents.dtype)
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {})

        config = self.vae.config
        decoded = self.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        if decoded.shape[2:] != (height, width):
            decoded = functional.interpolate(decoded, size=(height, width), mode="bilinear")
        self.maybe_free_model_hooks()
        picture: Any = self.image_processor.postprocess(decoded, output_type=output_type)
        return ImagePipelineOutput(images=picture)

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _read(self, text: str) -> Tensor:
        """Return the language model's states [1, L, width] for a text in the template."""
        tokens = self.tokenizer(
            _TEMPLATE.format(text), truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        return self.mllm(tokens.input_ids.to(self._execution_device)).last_hidden_state

    def _encode(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Return latents [1, C, h, w] of a reference, shrunk to the limits if needed but never enlarged."""
        width, height = image.size
        scale = min(math.sqrt(_MAX_PIXELS / (width * height)), _MAX_SIDE / max(width, height), 1)
        seen = image.resize((_floor(width * scale), _floor(height * scale)), _LANCZOS)
        pixels = torch.from_numpy(np.array(seen, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).latent_dist
        return (posterior.sample(generator) - self.vae.config.shift_factor) * self.vae.config.scaling_factor


def reference_arguments(
    _pipeline: OmniGen2Pipeline, prompt: PromptSpec, controls: Sequence[Image.Image]
) -> dict[str, Any]:
    """Arguments for texts and references. References use a separate generator with the same seed.

    Texts are put in the template twice, here and in the pipeline, as in training. An empty negative prompt is
    put in only once, in the pipeline.
    """
    return {
        "prompt": _TEMPLATE.format(prompt.prompt),
        "negative_prompt": prompt.neg and _TEMPLATE.format(prompt.neg),
        "images": controls,
        "image_generator": torch.Generator("cpu").manual_seed(prompt.seed),
    }


def reference_preview_arguments(
    pipeline: OmniGen2Pipeline, prompt: PromptSpec, controls: Sequence[Image.Image]
) -> dict[str, Any]:
    """As `reference_arguments`, for a preview: references are stretched to the picture's size."""
    size = (prompt.width, prompt.height)
    return {
        **reference_arguments(pipeline, prompt, [image.resize(size, _BILINEAR) for image in controls]),
        "negative_prompt": _TEMPLATE.format(prompt.neg),
        "image_generator": torch.Generator(pipeline._execution_device).manual_seed(prompt.seed),
    }


def _floor(side: float) -> int:
    return int(side) // _STEP * _STEP
