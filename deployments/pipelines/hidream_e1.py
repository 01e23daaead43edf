"""HiDream-E1: HiDream-I1's models editing an image by instruction. diffusers has no pipeline for it.

The transformer draws a canvas of twice the picture's width, of which the control image fills the right half:
it sees the noisy latents [B, 16, h, w] and those of the control image side by side as [B, 16, h, 2w], and of
what it predicts the left half counts. A step has three lanes, told apart by text and control image:

    nothing [positive, zeros]    image [negative, image]    edit [positive, image]

Guidance goes from the second lane to the third, is cut back to the third's length, and image guidance goes
from the first lane to that. The first lane's text is the positive one: so the model was published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.hidream_image.pipeline_hidream_image import HiDreamImagePipeline
from diffusers.pipelines.hidream_image.pipeline_output import HiDreamImagePipelineOutput
from PIL import Image
from torch import Tensor


class HiDreamEditPipeline(HiDreamImagePipeline):
    """HiDream-I1's components with the loop of HiDream-E1. No area rescaling: sizes are as asked for."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str,
        image: Image.Image,
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        generator: torch.Generator,
        negative_prompt: str = "",
        max_sequence_length: int = 128,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], object] | None = None,
    ) -> HiDreamImagePipelineOutput:
        """Render one picture of the control image's size, floored to 16 pixels.

        The control image (RGB) is stretched to `width` x `height`. With `guidance_scale` at most 1 there is
        the edit's lane alone, and image guidance does nothing.
        """
        self._guidance_scale = guidance_scale
        device = self._execution_device
        t5, llama, pooled = self._encode_lanes(prompt, negative_prompt, max_sequence_length, device)
        control = self._encode_image(image.resize((width, height), Image.Resampling.BILINEAR), device)
        if self.do_classifier_free_guidance:
            control = torch.cat([torch.zeros_like(control), control, control])
        high, wide = control.shape[-2:]
        latents = self.prepare_latents(
            1,
            self.transformer.config.in_channels,
            high * self.vae_scale_factor,
            wide * self.vae_scale_factor,
            pooled.dtype,
            device,
            generator,
        )
        self._make_room_for(high, 2 * wide)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        for step, time in enumerate(self.scheduler.timesteps):
            canvas = torch.cat([latents.expand(len(control), -1, -1, -1), control], dim=-1)
            predicted = self.transformer(
                hidden_states=canvas,
                timesteps=time.expand(len(control)),
                encoder_hidden_states_t5=t5,
                encoder_hidden_states_llama3=llama,
                pooled_embeds=pooled,
                return_dict=False,
            )[0]
            velocity = -predicted[..., :wide]
            if self.do_classifier_free_guidance:
                velocity = _guide(velocity, guidance_scale, image_guidance_scale)
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
            if callback_on_step_end:
                callback_on_step_end(self, step, time, {})
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        decoded = self.vae.decode(latents, return_dict=False)[0]
        images: Any = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return HiDreamImagePipelineOutput(images)

    def _encode_lanes(
        self, prompt: str, negative_prompt: str, max_sequence_length: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the lanes know of their texts.

        That is T5's states [lanes, tokens, 4096], those of Llama's layers [layers, lanes, tokens, 4096], and
        the pooled ones of both CLIPs [lanes, 2048].
        """
        embeddings: Any = self.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            prompt_4=None,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        t5, negative_t5, llama, negative_llama, pooled, negative_pooled = embeddings
        if not self.do_classifier_free_guidance:
            return t5, llama, pooled
        return (
            torch.cat([t5, negative_t5, t5]),
            torch.cat([llama, negative_llama, llama], dim=1),
            torch.cat([pooled, negative_pooled, pooled]),
        )

    def _encode_image(self, image: Image.Image, device: torch.device) -> Tensor:
        """Return the mode of an image's latents [1, 16, h, w]; sides are floored to 16 pixels."""
        pixels = self.image_processor.preprocess(image).to(device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _make_room_for(self, high: int, wide: int) -> None:
        """Let the transformer take latents of this size.

        It pads what is not square to `max_seq` tokens, which changes the picture: the checkpoint's own number
        stays wherever it is enough. For 1024 x 1024, 8192 are needed, and HiDream-E1-Full states 4608.
        """
        config = self.transformer.config
        own = config.max_resolution[0] * config.max_resolution[1] // config.patch_size**2
        self.transformer.max_seq = max(own, high * wide // config.patch_size**2)


def _guide(lanes: Tensor, guidance: float, image_guidance: float) -> Tensor:
    """Combine the lanes nothing, image and edit [3, C, h, w] into one prediction [1, C, h, w]."""
    nothing, image, edit = lanes.chunk(3)
    guided = image + guidance * (edit - image)
    lengths = [one.norm(dim=1, keepdim=True) for one in (edit, guided)]
    guided = guided * (lengths[0] / (lengths[1] + 1e-8)).clamp(0, 1)
    return nothing + image_guidance * (guided - nothing)
