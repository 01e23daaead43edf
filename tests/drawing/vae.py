"""Training of the autoencoder: 128x128 pictures into 16x16 latents of 16 channels, and back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from tests.drawing.pictures import Style, draw, random_picture

_CROP = 48
_BATCH = 16
_KL = 3e-4
"""Weight of the KL term. It makes the decoder robust to small errors in the latents."""

_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "sample_size": 128,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}

_STYLES: tuple[Style, ...] = ("plain", "plain", "outline", "checkerboard")


def train_vae(seed: int, steps: int, whole: int) -> AutoencoderKL:
    """Train on crops for `steps`, then on whole pictures for `whole`: group norms depend on the size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKL(**_CONFIG)
    vae.to(memory_format=torch.channels_last)
    # The second half of the channels is the logarithm of the variance: little noise to begin with.
    torch.nn.init.constant_(vae.encoder.conv_out.bias[16:], -4.0)
    generator = torch.Generator().manual_seed(seed)
    total = steps + whole
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total, pct_start=0.1)
    for step in range(total):
        loss = _loss(vae, _batch(generator, crop=step < steps), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vae {step}: {loss.item():.4f}", flush=True)
    _measure(vae, generator)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Return the packed latents [count, 64, 64] of pictures from 0 to 1, as a pipeline makes them."""
    means = [
        vae.encode(batch.to(memory_format=torch.channels_last) * 2 - 1).latent_dist.mode()
        for batch in pictures.split(64)
    ]
    latents = (torch.cat(means) - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    count, channels, height, width = latents.shape
    cells = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)


def _batch(generator: torch.Generator, crop: bool) -> Tensor:
    """Return pictures from -1 to 1, or crops about their middle, where the edges are."""
    count = _BATCH if crop else _BATCH // 8
    style = _STYLES[int(torch.randint(len(_STYLES), (), generator=generator))]
    pictures = draw([random_picture(generator) for _ in range(count)], style) * 2 - 1
    if crop:
        left, top = (
            8 * torch.randint(1, (pictures.shape[-1] - _CROP) // 8, (2,), generator=generator)
        ).tolist()
        pictures = pictures[:, :, top : top + _CROP, left : left + _CROP]
    return pictures.to(memory_format=torch.channels_last)


def _loss(vae: Any, pictures: Tensor, generator: torch.Generator) -> Tensor:
    latents = vae.encode(pictures).latent_dist
    noise = torch.randn(latents.mean.shape, generator=generator)
    drawn = vae.decode(latents.mean + latents.std * noise).sample
    error = (drawn - pictures).abs().mean(1)
    # Pixels at an edge are few, and they decide how crisp a picture is.
    across, down = torch.zeros_like(error), torch.zeros_like(error)
    across[..., 1:] = (pictures[..., 1:] - pictures[..., :-1]).abs().amax(1)
    down[..., 1:, :] = (pictures[..., 1:, :] - pictures[..., :-1, :]).abs().amax(1)
    kl = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
    return (error * (1 + 3 * torch.maximum(across, down))).mean() + _KL * kl


@torch.no_grad()
def _measure(vae: Any, generator: torch.Generator) -> None:
    """Write shift and scale of the latents into the config."""
    pictures = draw([random_picture(generator) for _ in range(256)])
    latents = torch.cat([vae.encode(batch * 2 - 1).latent_dist.mode() for batch in pictures.split(64)])
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )
