"""Krea 2 with reference images, which diffusers lacks: text encoding, sequence and attention.

Each control image is used twice. Qwen3-VL reads the control images, at an area of at most 384 x 384 pixels,
and then the prompt. The transformer reads their latents after those of the image itself:

    tokens      text (L)     image (N)    references (R)
    position    (0, 0, 0)    (0, y, x)    (k, y, x)         k = 1, 2, 3; y and x in patches of 16 pixels
    time        t            t            0                 modulates each token in each block

All tokens attend to all tokens, and the last layer takes the image's tokens. With `kv_cache`, references
attend only to references. Then their keys and values depend neither on the step nor on the prompt, so each
block computes them once per picture. A LoRA is trained for one of the two modes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import (
    Krea2Attention,
    Krea2AttnProcessor,
    Krea2Transformer2DModel,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from deployments.pipelines.krea2 import guided_arguments
from deployments.spec.job import PromptSpec, without

_SEEN_AREA = 384 * 384
"""Largest area at which the text encoder sees a control image, in pixels."""

_LATENT_AREA = 1024 * 1024
"""Largest area, in pixels, of a reference that is not scaled to the output's area."""

_VISION, _MERGED = 16, 2
"""Side of Qwen3-VL's patches in pixels, and of one token in patches."""

_STEP = 16
"""Sides of references are multiples of this: the VAE's factor 8 times patches of 2."""

_PAD = "<|image_pad|>"


@dataclass(slots=True)
class References:
    """The references of one picture: packed latents (1, R, 64), positions (R, 3), and cached keys and values.

    `kept` maps each block's attention to its keys and values, each (1, R, key heads, head channels). It is
    None without `kv_cache`.
    """

    latents: Tensor
    positions: Tensor
    kept: dict[Krea2Attention, tuple[Tensor, Tensor]] | None = field(default=None)


class KeptAttention(Krea2AttnProcessor):
    """Attention to the given tokens and to the references.

    A block's first call must get the references' tokens. Later calls reuse their keys and values.
    """

    def __init__(self, kept: dict[Krea2Attention, tuple[Tensor, Tensor]]) -> None:
        self._kept = kept

    def __call__(
        self,
        attn: Krea2Attention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return (1, S, channels) for `hidden_states` of that shape. `attention_mask` is ignored."""
        heads, key_heads = (attn.num_heads, attn.head_dim), (attn.num_kv_heads, attn.head_dim)
        query = _rotate(attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads)), image_rotary_emb)
        key = _rotate(attn.norm_k(attn.to_k(hidden_states).unflatten(-1, key_heads)), image_rotary_emb)
        value = attn.to_v(hidden_states).unflatten(-1, key_heads)
        if attn in self._kept:
            key, value = (torch.cat(pair, dim=1) for pair in zip((key, value), self._kept[attn], strict=True))
        else:
            self._kept[attn] = (key, value)
        groups = attn.num_heads // attn.num_kv_heads
        key, value = (tensor.repeat_interleave(groups, dim=2) for tensor in (key, value))
        attended = dispatch_attention_fn(query, key, value, backend=self._attention_backend).flatten(2, 3)
        return attn.to_out[0](attended * torch.sigmoid(attn.to_gate(hidden_states)))


def _rotate(heads: Tensor, rotary: Any) -> Any:  # noqa: ANN401 - diffusers declares wider types
    return apply_rotary_emb(heads, rotary, sequence_dim=1)


class Krea2EditTransformer(Krea2Transformer2DModel):
    """Krea 2's transformer over text, image and references, with the weights and names of its base class."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        position_ids: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the velocity (1, N, 64) of the image's packed latents (1, N, 64), as a tuple of one.

        `encoder_hidden_states` is (1, L, 12, text channels) without padding, `timestep` is (1,) in 0..1, and
        `attention_kwargs` holds `references`. Only the last N rows of `position_ids` are used: the pipeline
        makes the text rows for the prompt, and the negative prompt has another length.
        """
        references: References = (attention_kwargs or {})["references"]
        tokens, dtype = hidden_states.shape[1], hidden_states.dtype
        time = self.time_embed(timestep, dtype=dtype)
        noisy, clean = self._modulation(time), self._modulation(self.time_embed(0 * timestep, dtype=dtype))

        text = self.txt_in(self.text_fusion(encoder_hidden_states))
        sequence = torch.cat([text, self.img_in(hidden_states)], dim=1)
        positions = torch.cat([position_ids.new_zeros(text.shape[1], 3), position_ids[-tokens:]])
        latents = references.latents.to(dtype)
        if references.kept is None:
            sequence = torch.cat([sequence, self.img_in(latents)], dim=1)
            positions = torch.cat([positions, references.positions])
            parts = [noisy.expand(-1, text.shape[1] + tokens, -1), clean.expand(-1, latents.shape[1], -1)]
            sequence = self._blocks(sequence, torch.cat(parts, dim=1), positions)
        else:
            with self._attending(KeptAttention(references.kept)):
                if not references.kept:
                    self._blocks(self.img_in(latents), clean, references.positions)
                sequence = self._blocks(sequence, noisy, positions)
        image = sequence[:, text.shape[1] : text.shape[1] + tokens]
        return (self.final_layer(image, time),)

    def _modulation(self, time: Tensor) -> Tensor:
        """Return the modulation of all blocks, (1, 1, 6 * channels)."""
        return self.time_mod_proj(functional.gelu(time, approximate="tanh"))

    def _blocks(self, sequence: Tensor, modulation: Tensor, positions: Tensor) -> Tensor:
        rotary = self.rotary_emb(positions)
        for block in self.transformer_blocks:
            sequence = block(sequence, modulation, rotary)
        return sequence

    @contextmanager
    def _attending(self, processor: KeptAttention) -> Iterator[None]:
        """Let the blocks use `processor`, and remove it afterwards so that they hold none of its tensors."""
        # Any: the declared type has only other models' processors.
        attentions: list[Any] = [block.attn for block in self.transformer_blocks]
        try:
            for attention in attentions:
                attention.set_processor(processor)
            yield
        finally:
            for attention in attentions:
                attention.set_processor(Krea2AttnProcessor())


def edit_arguments(pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for one picture. One generator draws the references' latents, in order, then the noise."""
    generator = torch.Generator("cpu").manual_seed(prompt.seed)
    return {"generator": generator, **_arguments(pipeline, prompt, controls, controls, generator)}


def edit_preview_arguments(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    controls: Sequence[Image.Image],
) -> dict[str, Any]:
    """As `edit_arguments`, for a preview: the references have a separate generator."""
    drawn = [*controls[:1], *controls[2 if prompt.second_is_shown_only else 1 :]]
    generator = torch.Generator(pipeline._execution_device).manual_seed(prompt.seed)
    return _arguments(pipeline, prompt, controls, drawn, generator)


def _arguments(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    shown: Sequence[Image.Image],
    drawn: Sequence[Image.Image],
    generator: torch.Generator,
) -> dict[str, Any]:
    """Arguments with embeddings of the text and the images `shown`, and the images `drawn` as references."""
    area = prompt.width * prompt.height if prompt.options["match_target_res"] else None
    latents = [_encode(pipeline, _resize(_pixels(image), area), generator) for image in drawn]
    references = References(
        torch.cat([_pack(pipeline, grid) for grid in latents], dim=1),
        torch.cat([_positions(grid, number) for number, grid in enumerate(latents, start=1)]),
        {} if prompt.options["kv_cache"] else None,
    )
    seen = [_patches(_pixels(image)) for image in shown]
    return {
        **guided_arguments(prompt, lambda text: _read(pipeline, text, seen)),
        "attention_kwargs": {"references": references},
    }


def _pixels(control: Image.Image) -> Tensor:
    """Return an image as (1, 3, H, W), float32 in 0..1."""
    return torch.from_numpy(np.array(control, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def _resize(pixels: Tensor, area: int | None) -> Tensor:
    """Resize to `area`, or to at most a megapixel for None, in its own aspect, to multiples of 16."""
    height, width = sides = pixels.shape[2:]
    # Only if needed: sides from a square root are inexact, so exact halves of a step could round differently.
    if area or height * width > _LATENT_AREA:
        aspect = height / width
        new_height = math.sqrt((area or _LATENT_AREA) * aspect)
        sides = new_height, new_height / aspect
    sides = [max(_STEP, round(side / _STEP) * _STEP) for side in sides]
    return functional.interpolate(pixels, size=sides, mode="bilinear")


def _encode(pipeline: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ANN401
    """Return latents (1, 16, H/8, W/8) of an image, sampled from the VAE's posterior."""
    vae = pipeline.vae
    frames = (pixels * 2 - 1)[:, :, None].to(pipeline._execution_device, vae.dtype)
    latents = vae.encode(frames).latent_dist.sample(generator)[:, :, 0]
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents.float() - mean) / std


def _pack(pipeline: Any, latents: Tensor) -> Tensor:  # noqa: ANN401
    """Return latents (1, 16, H, W) as tokens (1, H/2 * W/2, 64)."""
    return pipeline._pack_latents(latents, *latents.shape)


def _positions(latents: Tensor, number: int) -> Tensor:
    """Return the positions of one reference's tokens, (H/2 * W/2, 3)."""
    rows, columns = (torch.arange(side // 2, device=latents.device) for side in latents.shape[2:])
    return torch.cartesian_prod(torch.tensor([number], device=latents.device), rows, columns)


def _patches(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return an image as Qwen3-VL takes it: patches (rows * columns, 3*2*16*16) and [1, rows, columns].

    Patches that form one token are adjacent. Each patch is repeated as two frames.
    """
    height, width = pixels.shape[2:]
    scale = min(1.0, math.sqrt(_SEEN_AREA / (height * width)))
    small = _bicubic(pixels, [max(round(side * scale), 28) for side in (height, width)]).clamp(0, 1)
    height, width = small.shape[2:]
    sides = smart_resize(height, width, _VISION * _MERGED, min_pixels=65536, max_pixels=16777216)
    image = (_bicubic(small, sides)[0] - 0.5) / 0.5
    rows, columns = (side // _VISION for side in sides)
    cells = image.view(3, rows // 2, 2, _VISION, columns // 2, 2, _VISION)
    frames = cells.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :].expand(-1, -1, -1, -1, -1, 2, -1, -1)
    return frames.reshape(rows * columns, -1), torch.tensor([[1, rows, columns]])


def _bicubic(pixels: Tensor, sides: Sequence[int]) -> Tensor:
    return functional.interpolate(pixels, size=list(sides), mode="bicubic", antialias=True)


def _read(pipeline: Any, text: str, seen: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Encode a prompt with images: hidden states (1, L, 12, text channels) and a mask (1, L) of ones."""
    tokenizer, device = pipeline.tokenizer, pipeline._execution_device
    pictures = "".join(
        f"Picture {number}: <|vision_start|>{_PAD * (int(grid.prod()) // _MERGED**2)}<|vision_end|>"
        for number, (_, grid) in enumerate(seen, start=1)
    )
    # A placeholder in a user's text would refer to an image that does not exist.
    prefix = pipeline.prompt_template_encode_prefix + pictures + without(text, _PAD)
    ids = [*tokenizer(prefix).input_ids, *tokenizer(pipeline.prompt_template_encode_suffix).input_ids]
    tokens = torch.tensor([ids], device=device)
    output = pipeline.text_encoder(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=torch.cat([patches for patches, _ in seen]).to(device),
        image_grid_thw=torch.cat([grid for _, grid in seen]).to(device),
        mm_token_type_ids=(tokens == tokenizer.convert_tokens_to_ids(_PAD)).int(),
        output_hidden_states=True,
    )
    taps = torch.stack([output.hidden_states[tap] for tap in pipeline.text_encoder_select_layers], dim=2)
    embeddings = taps[:, pipeline.prompt_template_encode_start_idx :]
    return embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=device)
