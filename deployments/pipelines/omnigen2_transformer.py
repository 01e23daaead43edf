"""OmniGen2's transformer, which no library has. Its blocks are those of Lumina-Image 2.0.

One sequence holds the text, the reference images and the image itself. L is the number of text tokens, T the
text encoder's width, n = h * w the number of 2 x 2 latent patches in the image, r that of all references
together, C the number of channels and d the width (2520):

    text        [1, L, T]      caption_embedder -> [1, L, d]    context_refiner
    reference   [1, C, 2h, 2w] ref_image_patch_embedder -> [1, h*w, d], plus image_index_embedding of its
                               number                           ref_image_refiner, image by image
    image       [1, C, 2h, 2w] x_embedder -> [1, n, d]          noise_refiner
    all         [1, L+r+n, d]  layers; the last n -> norm_out -> [1, n, 4C] -> [1, C, 2h, 2w]

The time modulates all blocks except the text's. Every block gets a token's position as three numbers:

    text token k                        (k, k, k)
    patch in row y and column x         (s, y, x)    s starts at L and grows by max(h, w) after each reference
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.transformer_lumina2 import (
    Lumina2CombinedTimestepCaptionEmbedding,
    Lumina2TransformerBlock,
)
from torch import Tensor, nn

_MAX_REFERENCES = 5

_ROPE_BASE = 10000.0


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin):
    """Predicts the velocity from noise to image, with the published model's configuration and names.

    `axes_lens` is the configured limit of positions. It is unused here: requests stay far below it.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: Sequence[int] = (40, 40, 40),
        axes_lens: Sequence[int] = (1024, 1664, 1664),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.timestep_scale = timestep_scale
        self.axes_dim_rope = tuple(axes_dim_rope)
        patch = patch_size**2

        def blocks(count: int, *, modulation: bool = True) -> nn.ModuleList:
            return nn.ModuleList(
                Lumina2TransformerBlock(
                    hidden_size,
                    num_attention_heads,
                    num_kv_heads,
                    multiple_of,
                    ffn_dim_multiplier,  # type: ignore[arg-type] - the block accepts None
                    norm_eps,
                    modulation,
                )
                for _ in range(count)
            )

        self.x_embedder = nn.Linear(patch * in_channels, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(patch * in_channels, hidden_size)
        self.image_index_embedding = nn.Parameter(torch.zeros(_MAX_REFERENCES, hidden_size))
        self.time_caption_embed = Lumina2CombinedTimestepCaptionEmbedding(
            hidden_size, text_feat_dim, norm_eps=norm_eps
        )
        self.noise_refiner = blocks(num_refiner_layers)
        self.ref_image_refiner = blocks(num_refiner_layers)
        self.context_refiner = blocks(num_refiner_layers, modulation=False)
        self.layers = blocks(num_layers)
        self.norm_out = LuminaLayerNormContinuous(
            embedding_dim=hidden_size,
            conditioning_embedding_dim=min(hidden_size, 1024),
            elementwise_affine=False,
            eps=1e-6,
            out_dim=patch * (out_channels or in_channels),
        )

    def forward(self, image: Tensor, time: Tensor, text: Tensor, references: Sequence[Tensor]) -> Tensor:
        """Return the velocity of an image's latents [1, C, H, W], of the same shape.

        `time` is [1], from 0 (noise) to 1 (image). `text` is [1, L, T]. `references` are up to five latents,
        each [1, C, H', W']. All sides are even.
        """
        modulation_input, context = self.time_caption_embed(text, time.float() * self.timestep_scale, text)
        grids = [self._grid(latents) for latents in (*references, image)]
        ids = [_text_positions(text), *_image_positions(grids, text)]
        rotary = [self._rotary(positions) for positions in ids]

        for block in self.context_refiner:
            context = block(context, None, rotary[0])
        parts = [context]
        for number, latents in enumerate(references):
            tokens = self.ref_image_patch_embedder(self._patchify(latents))
            tokens = tokens + self.image_index_embedding[number]
            for block in self.ref_image_refiner:
                tokens = block(tokens, None, rotary[1 + number], modulation_input)
            parts.append(tokens)
        tokens = self.x_embedder(self._patchify(image))
        for block in self.noise_refiner:
            tokens = block(tokens, None, rotary[-1], modulation_input)

        sequence, all_rotary = torch.cat([*parts, tokens], dim=1), torch.cat(rotary, dim=1)
        for block in self.layers:
            sequence = block(sequence, None, all_rotary, modulation_input)
        velocity = self.norm_out(sequence[:, -tokens.shape[1] :], modulation_input)
        return self._unpatchify(velocity, *grids[-1])

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches in latents."""
        patch = self.patch_size
        return latents.shape[2] // patch, latents.shape[3] // patch

    def _patchify(self, latents: Tensor) -> Tensor:
        """Return latents [1, C, 2h, 2w] as tokens [1, h*w, 4C], row by row, the channels innermost."""
        (rows, columns), patch = self._grid(latents), self.patch_size
        cells = latents.reshape(1, -1, rows, patch, columns, patch)
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(1, rows * columns, -1)

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        patch = self.patch_size
        cells = tokens.reshape(1, rows, columns, patch, patch, -1)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(1, -1, rows * patch, columns * patch)

    def _rotary(self, positions: Tensor) -> Tensor:
        """Return the rotations of positions [n, 3] as complex numbers [1, n, head channels / 2].

        Each axis rotates its own adjacent pairs of channels. Angles are computed in float64.
        """
        angles = [
            positions[:, axis, None].double() * self._frequencies(channels, positions.device)
            for axis, channels in enumerate(self.axes_dim_rope)
        ]
        all_angles = torch.cat(angles, dim=1)
        return torch.polar(torch.ones_like(all_angles), all_angles).to(torch.complex64)[None]

    @staticmethod
    def _frequencies(channels: int, device: torch.device) -> Tensor:
        return _ROPE_BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)


def _text_positions(text: Tensor) -> Tensor:
    return torch.arange(text.shape[1], device=text.device)[:, None].expand(-1, 3)


def _image_positions(grids: Sequence[tuple[int, int]], text: Tensor) -> list[Tensor]:
    """Return the positions of the patches of each image, [rows * columns, 3]."""
    positions, start = [], text.shape[1]
    for rows, columns in grids:
        axes = [torch.tensor([start]), torch.arange(rows), torch.arange(columns)]
        positions.append(torch.cartesian_prod(*axes).to(text.device))
        start += max(rows, columns)
    return positions
