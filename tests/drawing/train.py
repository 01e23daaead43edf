"""Training of the drawing FLUX.1, from nothing but a seed.

    python -m tests.drawing.train --out DIR

writes a FluxPipeline of bfloat16 weights into DIR, and two LoRAs below `DIR/loras`. It needs two CPU cores,
2 GB of memory and half an hour (1712 s for the committed files). Every random number comes from the seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from tests.drawing.flow import base_optimizers, make_pairs, make_transformer, train
from tests.drawing.loras import train_lora
from tests.drawing.pictures import Style
from tests.drawing.text import TextSide, make_text_side
from tests.drawing.vae import train_vae

_STYLES: tuple[Style, ...] = ("outline", "checkerboard")


def save_pipeline(vae: AutoencoderKL, transformer: FluxTransformer2DModel, text: TextSide, out: Path) -> None:
    """Write everything except the LoRAs. This converts the models to bfloat16."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        transformer=transformer,
    )
    pipeline.to(torch.bfloat16).save_pretrained(out)


def main() -> None:
    """Train and write everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000, help="of the transformer")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    begun = time.monotonic()
    seed: int = arguments.seed

    vae = train_vae(seed, steps=1800, whole=100)
    print(f"autoencoder after {time.monotonic() - begun:.0f} s", flush=True)
    text, transformer = make_text_side(seed), make_transformer(seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = make_pairs(vae, 4000, generator)
    print(f"pictures after {time.monotonic() - begun:.0f} s", flush=True)
    optimizers = base_optimizers(transformer, text)
    train(transformer, text, pairs, optimizers, steps=arguments.steps, generator=generator)
    print(f"base after {time.monotonic() - begun:.0f} s", flush=True)
    text.clip.requires_grad_(False)
    text.t5.requires_grad_(False)
    for number, style in enumerate(_STYLES, 1):
        path = arguments.out / "loras" / f"{style}.safetensors"
        train_lora(vae, transformer, text, style, path, seed=seed + number, steps=350)
        print(f"{style} after {time.monotonic() - begun:.0f} s", flush=True)
    save_pipeline(vae, transformer, text, arguments.out)


if __name__ == "__main__":
    main()
