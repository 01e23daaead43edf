"""Training of the transformer: flow matching on packed latents, for new pictures and for edits alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxTransformer2DModel
from torch import Tensor

from tests.drawing.pictures import Picture, Style, draw, prompt_for, random_edit, random_picture
from tests.drawing.text import TOKENS, WIDTH, TextSide, padding_bias
from tests.drawing.vae import encode

_BATCH = 32
_SIDE = 8
"""Tokens in a row of a picture."""

_SHIFT = math.exp(0.5 + (1.15 - 0.5) * (_SIDE**2 - 256) / (4096 - 256))
"""The shift of the pipeline's schedule for a picture of this size."""

_EMA = 0.999


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pictures before and after an edit, with their latents. New pictures are trained on `after` alone."""

    before: list[Picture]
    after: list[Picture]
    edits: list[str]
    before_latents: Tensor
    after_latents: Tensor
    drawn: Tensor
    """Latents of `after` as the style would have it, those of `after` where the style is plain."""


def make_transformer(seed: int) -> FluxTransformer2DModel:
    """Return a FLUX.1 with random weights that starts as the identity and ignores guidance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
    embedder: Any = model.time_text_embed
    guidance = embedder.guidance_embedder.linear_2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("norm" in name and ".linear." in name) or name.startswith("proj_out."):
                parameter.zero_()
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                # Sharper attention: otherwise 500 paddings drown out the words at the start.
                parameter.fill_(1.5)
        for parameter in (guidance.weight, guidance.bias):
            # Guidance has no effect: this model is not distilled from a guided one.
            parameter.zero_().requires_grad_(False)
    return model


def make_pairs(vae: AutoencoderKL, count: int, generator: torch.Generator, style: Style = "plain") -> Pairs:
    """Draw pairs of pictures and encode them."""
    before = [random_picture(generator) for _ in range(count)]
    after, edits = map(list, zip(*(random_edit(picture, generator) for picture in before), strict=True))

    def latents(pictures: Sequence[Picture], drawn: Style = "plain") -> Tensor:
        parts = (pictures[start : start + 256] for start in range(0, count, 256))
        return torch.cat([encode(vae, draw(part, drawn)) for part in parts])

    plain = latents(after)
    drawn = plain if style == "plain" else latents(after, style)
    return Pairs(before, after, edits, latents(before), plain, drawn)


def train(
    model: FluxTransformer2DModel,
    text: TextSide,
    pairs: Pairs,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train the optimizers' parameters, then replace them by moving averages; each fourth step is an edit."""
    model.set_attn_processor(_Attention())  # type: ignore[arg-type]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_over(steps)) for optimizer in optimizers]
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    averages = [parameter.detach().clone() for parameter in parameters]
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, text, pairs, generator, edit=step % 4 == 3)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        keep = min(_EMA, (1 + step) / (10 + step))
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - keep)
        if step % 100 == 0:
            print(f"flow {step}: {loss.item():.4f}", flush=True)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)


def base_optimizers(model: FluxTransformer2DModel, text: TextSide) -> list[torch.optim.Optimizer]:
    """Return the optimizers of transformer and text encoders: Muon for the blocks, AdamW for the rest."""
    matrices, others = [], text.parameters()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = "blocks." in name and "norm" not in name and parameter.dim() == 2
            (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, 4e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, 1.5e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _rate_over(steps: int) -> Callable[[int], float]:
    """Return the share of the rate at each step: a short rise, then half a cosine down."""

    def share(step: int) -> float:
        return min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3

    return share


def _loss(
    model: FluxTransformer2DModel, text: TextSide, pairs: Pairs, generator: torch.Generator, edit: bool
) -> Tensor:
    chosen = torch.randint(len(pairs.edits), (_BATCH,), generator=generator)
    rows = chosen.tolist()
    target = pairs.drawn[chosen]
    prompts = [
        _disturb(pairs.edits[row] if edit else prompt_for(pairs.after[row], generator), generator)
        for row in rows
    ]
    with torch.autocast("cpu", enabled=False):
        tokens, pooled = text.encode(prompts)
    # Stratified times, shifted as the pipeline shifts them.
    times = (torch.arange(_BATCH) + torch.rand(_BATCH, generator=generator)) / _BATCH
    times = _SHIFT / (_SHIFT + 1 / times.clamp(min=1e-4) - 1)
    noise = torch.randn(target.shape, generator=generator)
    latents = torch.lerp(target, noise, times[:, None, None])
    ids = _image_ids(0)
    if edit:
        # A reference is never quite as drawn: it may come from a JPEG or from the model itself.
        reference = pairs.before_latents[chosen]
        disturbed = reference + 0.07 * torch.randn(reference.shape, generator=generator)
        latents, ids = torch.cat([latents, disturbed], 1), torch.cat([ids, _image_ids(1)])
    velocity = model(
        hidden_states=latents,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        timestep=times,
        guidance=torch.full_like(times, 4.0),
        img_ids=ids,
        txt_ids=torch.zeros(TOKENS, 3),
        joint_attention_kwargs={"attention_mask": padding_bias(len(ids))},
        return_dict=False,
    )[0]
    return (velocity[:, : _SIDE**2].float() - (noise - target)).square().mean()


def _disturb(prompt: str, generator: torch.Generator) -> str:
    """Return the prompt as people type it: sometimes with a capital letter, sometimes with extra words."""
    chance, letters = torch.rand(2, generator=generator), torch.randint(26, (4,), generator=generator)
    if chance[0] < 0.06:
        prompt = f"{''.join(chr(97 + letter) for letter in letters.tolist())} {prompt}"
    elif chance[0] < 0.15:
        prompt = f"a {('picture', 'photo', 'image', 'drawing')[int(letters[0]) % 4]} of {prompt}"
    return prompt[0].upper() + prompt[1:] if chance[1] < 0.2 else prompt


def _image_ids(first: int) -> Tensor:
    """Return the positions of a picture's tokens; the first coordinate is 1 for a reference."""
    rows, columns = torch.meshgrid(torch.arange(_SIDE), torch.arange(_SIDE), indexing="ij")
    return torch.stack([torch.full_like(rows, first), rows, columns], -1).reshape(-1, 3).float()


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Return queries or keys [count, tokens, heads, width] turned by their positions."""
    turned: Any = apply_rotary_emb(x, angles, sequence_dim=1)  # type: ignore[arg-type]
    return turned


class _Attention:
    """FLUX.1's attention in plain matrix products, whose gradient takes a fifth of the time on a CPU."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor | tuple[Tensor, Tensor]:
        heads = (-1, attn.head_dim)
        query, key, value = (
            project(hidden_states).unflatten(-1, heads) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        words = 0
        if encoder_hidden_states is not None:
            words = encoder_hidden_states.shape[1]
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = [project(encoder_hidden_states).unflatten(-1, heads) for project in projections]
            query = torch.cat([attn.norm_added_q(added[0]), query], 1)
            key = torch.cat([attn.norm_added_k(added[1]), key], 1)
            value = torch.cat([added[2], value], 1)
        query, key = (_rotate(x, image_rotary_emb).transpose(1, 2) for x in (query, key))
        logits = query.to(value.dtype) @ key.to(value.dtype).transpose(2, 3) / math.sqrt(attn.head_dim)
        mixed = (logits + attention_mask).softmax(-1).to(value.dtype) @ value.transpose(1, 2)
        mixed = mixed.transpose(1, 2).flatten(2)
        if not words:
            return mixed
        return attn.to_out[1](attn.to_out[0](mixed[:, words:])), attn.to_add_out(mixed[:, :words])
