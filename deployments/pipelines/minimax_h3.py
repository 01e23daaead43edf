"""MiniMax-H3: video and sound from one packed sequence, built from diffusers' parts for it.

diffusers' own pipeline takes other lengths, draws the sound's noise at other points, and needs torchvision.
Rows of the sequence: text, first frame, sound (left, then right), video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_minimax_h3 import AutoencoderKLMiniMaxH3
from diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio import AutoencoderKLMiniMaxH3Audio
from diffusers.models.transformers.transformer_minimax_h3 import MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3SetTimestepsStep,
    patchify_video_latents,
)
from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition, get_qwen3vl_prompt_embeds
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import (
    MINIMAX_H3_AUDIO_CHANNELS,
    MINIMAX_H3_AUDIO_TAG,
    MINIMAX_H3_TEXT_TAG,
    MINIMAX_H3_VIDEO_TAG,
    audio_latent_num_frames,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3Scheduler
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from deployments.spec.job import PromptSpec

_TEXT_LAYER = 50
"""Layer of the text encoder whose hidden states the transformer reads."""

_FIRST_FRAME_TIME = 0.999
"""Time of the first frame: almost clean, as in training."""

_PIXEL_MEAN, _PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's statistics, which the video VAE uses."""

_PREVIEW_TOKENS = 512
"""Longest prompt in the trainer, in tokens."""

_MIN_LATENT_FRAMES = 7
"""Fewest latent frames that the VAE can decode."""


def arguments(_pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for the control image, if there is one: stretched to the video's size."""
    images = [image.resize((prompt.width, prompt.height), Image.Resampling.LANCZOS) for image in controls]
    return {"image": images[0], "seen": images[0]} if images else {}


def preview_arguments(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    controls: Sequence[Image.Image],
) -> dict[str, Any]:
    """As `arguments`, but the text encoder sees the unstretched image and only the start of a long prompt."""
    seen = {"seen": controls[0]} if controls else {}
    return {**arguments(pipeline, prompt, controls), **seen, "most_tokens": _PREVIEW_TOKENS}


class TextEncoder(Qwen3VLForConditionalGeneration):
    """Qwen3-VL without the layers above the one that is read, which saves 12 GiB."""

    @classmethod
    def from_pretrained(cls, directory: Path, **options: Any) -> Self:  # type: ignore[override]  # noqa: ANN401
        """Load the needed layers of a whole checkpoint, plus one: the last layer's states are normalised."""
        config: Any = Qwen3VLConfig.from_pretrained(directory)
        config.text_config.num_hidden_layers = min(_TEXT_LAYER + 1, config.text_config.num_hidden_layers)
        return super().from_pretrained(directory, config=config, **options)


@dataclass(frozen=True, slots=True)
class VideoWithSound:
    """Frames float32 [1, F, H, W, 3] in 0..1, and a waveform float32 [1, 2, samples] in -1..1 or None."""

    frames: np.ndarray
    audio: Tensor | None


@dataclass(frozen=True, slots=True)
class _Layout:
    """The transformer's inputs about the sequence; the first `first_frame_rows` video rows stay fixed."""

    fields: dict[str, Tensor]
    first_frame_rows: int


class _TokenTypes:
    """Marks image tokens as Qwen3-VL's processor does, which needs torchvision."""

    def __init__(self, image_token: int) -> None:
        self._image_token = image_token

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        return [[int(token == self._image_token) for token in row] for row in rows]


class MiniMaxH3Pipeline(DiffusionPipeline):
    """Video from text or from text and a first frame. Guidance is distilled into the weights."""

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae"

    def __init__(
        self,
        text_encoder: Qwen3VLForConditionalGeneration,
        tokenizer: Any,  # noqa: ANN401 - the library's tokenizers share no typed base
        image_processor: Qwen2VLImageProcessorPil,
        transformer: MiniMaxH3Transformer3DModel,
        vae: AutoencoderKLMiniMaxH3,
        audio_vae: AutoencoderKLMiniMaxH3Audio,
        audio_scheduler: MiniMaxH3Scheduler,
        scheduler: MiniMaxH3Scheduler | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_processor=image_processor,
            transformer=transformer,
            vae=vae,
            audio_vae=audio_vae,
            audio_scheduler=audio_scheduler,
            scheduler=scheduler,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        width: int,
        height: int,
        num_frames: int,
        num_inference_steps: int,
        generator: torch.Generator,
        image: Image.Image | None = None,
        seen: Image.Image | None = None,
        most_tokens: int | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], object] | None = None,
    ) -> VideoWithSound:
        """Render `num_frames` at 24 frames per second. Sides are multiples of 32 pixels.

        `num_frames` is 5 plus a multiple of 17, with sound, or 1, without sound. `image` is the first frame,
        of the video's size, and `seen` is the version for the text encoder. A prompt is cut to `most_tokens`.
        `guidance_scale` has no effect. `generator`, on the CPU, draws the noise of the first frame, then of
        the video, then of the sound.
        """
        device = self._execution_device
        text, tags = self._read(prompt.strip(), seen, most_tokens)
        ratio = self.vae.spatial_compression_ratio
        single = num_frames == 1
        shape = (1 if single else (num_frames - 5) // 17 * 5 + 2, height // ratio, width // ratio)
        length = 0 if single else audio_latent_num_frames(num_frames)
        first = self._encode(image, generator) if image else []
        latents = torch.randn(1, self.vae.config.latent_channels, *shape, generator=generator)
        sound = torch.randn(1, 2, self.audio_vae.config.latent_channels, length, generator=generator)
        noise = patchify_video_latents(latents, self.transformer.config.patch_size)
        rows = torch.cat([*first, noise]).to(device)
        sound_rows = sound[0].permute(0, 2, 1).flatten(0, 1).to(device)
        layout = self._lay_out(tags, shape, length, has_first=bool(first))
        self._denoise(rows, sound_rows, text, layout, num_inference_steps, callback_on_step_end)
        frames = self._decode(rows[layout.first_frame_rows :], shape, num_frames)
        return VideoWithSound(frames, self._decode_sound(sound_rows, length) if length else None)

    def _read(self, prompt: str, seen: Image.Image | None, most_tokens: int | None) -> tuple[Tensor, Tensor]:
        """Return the text's states (1, L, channels) and the tag of each (L,): text or picture."""
        token_id = self.tokenizer.convert_tokens_to_ids
        pad, image_token = token_id("<|endoftext|>"), token_id("<|image_pad|>")
        tokens: list[int] = []
        tags: list[int] = []
        vision: dict[str, Tensor] = {}
        if seen is not None:
            processed = self.image_processor(images=[seen], return_tensors="pt")
            vision = {key: processed[key] for key in ("pixel_values", "image_grid_thw")}
            count = int(vision["image_grid_thw"].prod()) // self.image_processor.merge_size**2
            label = self._tokenize("<Picture 1>: ")
            picture = [token_id("<|vision_start|>"), *[image_token] * count, token_id("<|vision_end|>")]
            tokens = label + picture
            tags = [MINIMAX_H3_TEXT_TAG] * len(label) + [MINIMAX_H3_VIDEO_TAG] * len(picture)
        words = self._tokenize(prompt)[:most_tokens] or [pad]
        text = get_qwen3vl_prompt_embeds(
            self.text_encoder,
            _TokenTypes(image_token),
            tokens + words,
            vision,
            text_encoder_layer=_TEXT_LAYER,
            device=self._execution_device,
            dtype=self.text_encoder.dtype,
        )
        return text, torch.tensor(tags + [MINIMAX_H3_TEXT_TAG] * len(words))

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode(self, image: Image.Image, generator: torch.Generator) -> list[Tensor]:
        """Return the first frame's rows, on the CPU, with a little noise that stays."""
        pixels = torch.from_numpy(np.array(image)).to(self._execution_device)
        pixels = pixels.permute(2, 0, 1)[None, :, None]
        latents = encode_vae_condition(self.vae, pixels, _PIXEL_MEAN, _PIXEL_STD)
        noise = torch.randn(latents.shape, generator=generator)
        noised = self.scheduler.scale_noise(latents, _FIRST_FRAME_TIME, noise)
        return [patchify_video_latents(noised, self.transformer.config.patch_size)]

    def _lay_out(self, tags: Tensor, shape: tuple[int, int, int], length: int, *, has_first: bool) -> _Layout:
        names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
        *values, first_frame_rows, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            tags,
            *shape,
            length,
            self.transformer.config.patch_size,
            MINIMAX_H3_AUDIO_CHANNELS,
            MINIMAX_H3_AUDIO_TAG,
            MINIMAX_H3_VIDEO_TAG,
            ("first",) if has_first else (),
        )
        return _Layout(dict(zip(names, values, strict=True)), first_frame_rows)

    def _denoise(
        self,
        rows: Tensor,
        sound_rows: Tensor,
        text: Tensor,
        layout: _Layout,
        steps: int,
        callback: Callable[[Any, int, Tensor, dict[str, Any]], object] | None,
    ) -> None:
        """Denoise the rows of video and sound in place, except those of the first frame."""
        device, first = self._execution_device, layout.first_frame_rows
        fields = {name: value.to(device) for name, value in layout.fields.items()}
        for scheduler in (self.scheduler, self.audio_scheduler):
            # The scheduler counts the ends of the steps: one more than there are steps.
            scheduler.set_timesteps(steps + 1, device=device)
        self.num_timesteps = len(self.scheduler.timesteps)
        times = zip(self.scheduler.timesteps, self.audio_scheduler.timesteps, strict=True)
        for step, (time, sound_time) in enumerate(times):
            unique, indices = MiniMaxH3SetTimestepsStep.build_row_timesteps(
                layout.fields["video_indices"],
                layout.fields["audio_indices"],
                first,
                0,
                text.shape[1],
                float(time),
                float(sound_time),
                max(float(time), _FIRST_FRAME_TIME),
                1.0,
            )
            velocity, sound_velocity = self.transformer(
                hidden_states=rows[None],
                audio_hidden_states=sound_rows[None],
                encoder_hidden_states=text,
                timestep=unique.to(device),
                timestep_indices=indices.to(device),
                return_dict=False,
                **fields,
            )
            stepped = self.scheduler.step(velocity[0, first:].float(), time, rows[first:], return_dict=False)
            rows[first:] = stepped[0]
            sound_velocity = sound_velocity[0].float()
            stepped = self.audio_scheduler.step(sound_velocity, sound_time, sound_rows, return_dict=False)
            sound_rows[:] = stepped[0]
            if callback is not None:
                callback(self, step, time, {})

    def _decode(self, rows: Tensor, shape: tuple[int, int, int], num_frames: int) -> np.ndarray:
        frames, height, width = shape
        config, (_, patch_h, patch_w) = self.vae.config, self.transformer.config.patch_size
        patches = rows.reshape(
            1, frames, height // patch_h, width // patch_w, config.latent_channels, 1, patch_h, patch_w
        )
        latents = patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(1, config.latent_channels, *shape)
        latents = latents * _spread(config.latents_std, latents) + _spread(config.latents_mean, latents)
        # The VAE cannot decode the one latent of a picture, or the two of the shortest video.
        missing = max(_MIN_LATENT_FRAMES - frames, 0)
        latents = torch.cat([latents, latents[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        video = self.vae.decode(latents, return_dict=False)[0][:, :, :num_frames].float()
        video = (video * _spread(_PIXEL_STD, video) + _spread(_PIXEL_MEAN, video)).clamp(0, 1)
        return video.permute(0, 2, 3, 4, 1).cpu().numpy()

    def _decode_sound(self, rows: Tensor, length: int) -> Tensor:
        config = self.audio_vae.config
        latents = rows.reshape(MINIMAX_H3_AUDIO_CHANNELS, length, -1).permute(0, 2, 1)
        latents = latents * _spread(config.latents_std, latents) + _spread(config.latents_mean, latents)
        # The VAE has one channel, so the two channels form a batch.
        return self.audio_vae.decode(latents, return_dict=False)[0].float().permute(1, 0, 2)


def _spread(values: Sequence[float], tensor: Tensor) -> Tensor:
    """Return one value per channel, shaped to broadcast over `tensor` (N, channels, ...)."""
    return torch.tensor(values, device=tensor.device).view(1, -1, *[1] * (tensor.ndim - 2))
