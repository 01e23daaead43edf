"""HiDream-O1-Image: a language model that draws pixels. No VAE, no other text encoder, no cross-attention.

Qwen3-VL's language model reads one sequence: the prompt, then the noisy picture in patches of 32 x 32 pixels.
A linear layer turns its output at the patches into the clean picture. T is the number of text tokens (the
last one is the time token), N = H/32 * W/32 the number of patches, and D the language model's width (4096):

    text      token ids [T]           embed_tokens -> [1, T, D]; the last row becomes t_embedder1(time)
    picture   [1, 3, H, W] in -1..1   patches [1, N, 3072] -> x_embedder -> [1, N, D]
    both      [1, T+N, D]             language_model -> the last N -> final_layer2 -> [1, N, 3072]

    attention    text before the time token: causal
                 time token and patches: to everything
    position     text token i: (i, i, i) as (t, y, x)
                 patch in row r and column c: (4096, 4096+r, 4096+c), for any T

The time token is the only time conditioning; there are no adaptive norms. The checkpoint's vision tower and
`lm_head` serve other purposes and are not loaded. Rotary frequencies must stay float32: rounding them to
bfloat16 would shift the angles of positions above 4096 by several radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel, Qwen3VLTextModel

PATCH = 32
"""Side of a patch in pixels."""

NOISE_SCALE = 8.0
"""Standard deviation of the initial noise, as in training."""

_PIXELS = 3 * PATCH * PATCH
_FIRST_POSITION = 4096
_FREQUENCIES = 128
_MIN_SIGMA = 1e-3
"""Smallest sigma that the trainer divides by."""

_TEXT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<|boi_token|><|tms_token|>"
"""The prompt as a user's message, then the begin-of-image token and the time token."""


class TimeEmbedding(nn.Module):
    """Embeds a time in 0..1 as one vector [D]: cosines and sines of 128 frequencies, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed a time, float32 of shape [], for layers of `dtype`."""
        octaves = torch.arange(_FREQUENCIES, dtype=torch.float32, device=time.device) / _FREQUENCIES
        angles = time * 1000 * torch.exp(-math.log(10_000) * octaves)
        return self.mlp(torch.cat([angles.cos(), angles.sin()]).to(dtype))


class PatchEmbedding(nn.Module):
    """Turns patches [.., 3072] into tokens [.., D] through a bottleneck of D/4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Linear(_PIXELS, width // 4, bias=False)
        self.proj2 = nn.Linear(width // 4, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches."""
        return self.proj2(self.proj1(patches))


class PatchHead(nn.Module):
    """Turns tokens [.., D] into patches [.., 3072]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, _PIXELS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens to pixels."""
        return self.linear(tokens)


class PixelModel(nn.Module):
    """The modules below the checkpoint's `model.` that pictures need."""

    def __init__(self, config: Qwen3VLConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        width = text.hidden_size
        self.language_model: Any = Qwen3VLTextModel._from_config(text)
        self.t_embedder1 = TimeEmbedding(width)
        self.x_embedder = PatchEmbedding(width)
        self.final_layer2 = PatchHead(width)


class PixelTransformer(Qwen3VLPreTrainedModel):
    """The denoiser, with the checkpoint's names. The module's docstring describes its architecture."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.visual\.", r"^lm_head\."]  # noqa: RUF012 - transformers' own

    def __init__(self, config: Qwen3VLConfig) -> None:
        super().__init__(config)
        self.model = PixelModel(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> PixelTransformer:  # noqa: ANN401
        """Load as transformers does, but require every tensor.

        Raises `ValueError` if the checkpoint lacks tensors, as a plain Qwen3-VL does: they would be random.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"the checkpoint is not HiDream-O1: it lacks {missing[0]} and {len(missing) - 1} more"
            )
        return model

    def forward(self, input_ids: Tensor, patches: Tensor, time: Tensor, rows: int) -> Tensor:
        """Predict the clean picture's patches [1, N, 3072] from noisy ones.

        `input_ids` [1, T] end in the time token. `patches` [1, N, 3072] form `rows` rows. `time` is a
        float32 of shape [], from 0 (noise) to 1 (clean picture).
        """
        text = input_ids.shape[1]
        embeds = self.model.language_model.embed_tokens(input_ids)
        at_time = self.model.t_embedder1(time, embeds.dtype)
        sequence = torch.cat(
            [embeds[:, :-1], at_time.expand(1, 1, -1), self.model.x_embedder(patches.to(embeds.dtype))], dim=1
        )
        states = self.model.language_model(
            inputs_embeds=sequence,
            position_ids=_positions(text, rows, patches.shape[1] // rows).to(sequence.device),
            attention_mask=_mask(text, sequence),
            use_cache=False,
        ).last_hidden_state
        return self.model.final_layer2(states[:, text:])


def _positions(text: int, rows: int, columns: int) -> Tensor:
    """Return the positions [3, 1, T+N] of text and patches, int64."""
    words = torch.arange(text).expand(3, text)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    patches = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + _FIRST_POSITION
    return torch.cat([words, patches], dim=1)[:, None]


def _mask(text: int, sequence: Tensor) -> Tensor:
    """Return the additive attention mask [1, 1, T+N, T+N]: 0, or the dtype's minimum where masked."""
    length = sequence.shape[1]
    minimum = torch.finfo(sequence.dtype).min
    mask = torch.full((length, length), minimum, dtype=sequence.dtype, device=sequence.device).triu(1)
    mask[text - 1 :] = 0
    return mask[None, None]


def to_patches(pixels: Tensor) -> Tensor:
    """Cut [1, 3, H, W] into patches [1, N, 3072], row by row, each in the order (channel, y, x)."""
    _, _, height, width = pixels.shape
    cells = pixels.reshape(1, 3, height // PATCH, PATCH, width // PATCH, PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(1, -1, _PIXELS)


def to_pixels(patches: Tensor, rows: int) -> Tensor:
    """Join patches [1, N, 3072] in `rows` rows to an image [1, 3, H, W]."""
    cells = patches.reshape(1, rows, -1, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(1, 3, rows * PATCH, -1)


class HiDreamO1Pipeline(DiffusionPipeline):
    """Text to image as the trainer samples it: flow matching, Euler steps, a shift of 3."""

    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: PixelTransformer,
        tokenizer: Qwen2Tokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, tokenizer=tokenizer, scheduler=scheduler)
        self.num_timesteps = 0

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
        negative_prompt: str = "",
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], object] | None = None,
    ) -> ImagePipelineOutput:
        """Render one picture as an array [1, H, W, 3] in 0..1. Sides are multiples of 32, at least 64.

        The negative prompt is used with guidance above 1. An empty one is encoded like any other.
        """
        device, dtype = self._execution_device, self.transformer.dtype
        texts = [prompt, negative_prompt] if guidance_scale > 1 else [prompt]
        tokens = [self._tokenize(text).to(device) for text in texts]
        noise = torch.randn((1, 3, height, width), generator=generator, dtype=torch.float32)
        # As in the trainer, the picture is rounded to the model's dtype after each step; the step is float32.
        state = to_patches(NOISE_SCALE * noise).to(device, dtype)
        rows = height // PATCH
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.num_timesteps = len(self.scheduler.timesteps)
        for step, time in enumerate(self.scheduler.timesteps):
            noisy, sigma = state.float(), (time / 1000).clamp(min=_MIN_SIGMA)
            velocities = [
                (self.transformer(ids, state, 1 - time / 1000, rows).float() - noisy) / sigma
                for ids in tokens
            ]
            velocity = velocities[0]
            if guidance_scale > 1:
                velocity = velocities[1] + guidance_scale * (velocities[0] - velocities[1])
            # The scheduler expects a velocity towards the noise.
            state = self.scheduler.step(-velocity, time, noisy, return_dict=False)[0].to(dtype)
            if callback_on_step_end:
                callback_on_step_end(self, step, time, {})
        pixels = to_pixels(state.float(), rows).permute(0, 2, 3, 1)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(((pixels + 1) / 2).clamp(0, 1).cpu().numpy())

    def _tokenize(self, text: str) -> Tensor:
        """Return the ids [1, T] of a prompt of any length."""
        return self.tokenizer(_TEXT.format(text), add_special_tokens=False, return_tensors="pt").input_ids
