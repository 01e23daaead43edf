"""HiDream-E1: HiDream-I1's models edit an image by instruction. diffusers has no pipeline for it.

The transformer draws a canvas of twice the picture's width, with the control image in the right half. Its
input is the noisy latents [B, 16, h, w] and the control image's latents side by side, [B, 16, h, 2w]. Only
the left half of its prediction is used. A step has three lanes [text, control image]:

    nothing [positive, zeros]    image [negative, image]    edit [positive, image]

Guidance extrapolates from `image` to `edit` and is clipped to the norm of `edit`. Image guidance extrapolates
from `nothing` to that result. `nothing` uses the positive prompt, as in the published code.
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
    """HiDream-I1's components with HiDream-E1's loop. Sizes are as requested, without area rescaling."""

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
        """Render one picture of `width` x `height`, floored to multiples of 16 pixels.

        The control image (RGB) is stretched to that size. If `guidance_scale` is at most 1, only the edit
        lane runs and image guidance has no effect.
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
        """Return the text embeddings of all lanes.

        These are T5's states [lanes, tokens, 4096], the states of Llama's layers [layers, lanes, tokens,
        4096] and the pooled states of both CLIPs [lanes, 2048].
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
        """Return the mode of an image's latents [1, 16, h, w]. Its sides are floored to 16 pixels."""
        pixels = self.image_processor.preprocess(image).to(device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _make_room_for(self, high: int, wide: int) -> None:
        """Raise the transformer's `max_seq` if needed for latents of this size.

        The transformer pads non-square latents to `max_seq` tokens, which changes the picture. So the
        checkpoint's value is kept if it is large enough. A picture of 1024 x 1024 needs 8192 tokens, but
        HiDream-E1-Full configures 4608.
        """
        config = self.transformer.config
        configured = config.max_resolution[0] * config.max_resolution[1] // config.patch_size**2
        self.transformer.max_seq = max(configured, high * wide // config.patch_size**2)


def _guide(lanes: Tensor, guidance: float, image_guidance: float) -> Tensor:
    """Combine the lanes `nothing`, `image` and `edit` [3, C, h, w] into one prediction [1, C, h, w]."""
    nothing, image, edit = lanes.chunk(3)
    guided = image + guidance * (edit - image)
    lengths = [one.norm(dim=1, keepdim=True) for one in (edit, guided)]
    guided = guided * (lengths[0] / (lengths[1] + 1e-8)).clamp(0, 1)
    return nothing + image_guidance * (guided - nothing)
