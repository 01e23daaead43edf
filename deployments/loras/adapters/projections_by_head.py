"""Reorders the fused query, key and value rows in DiffSynth-Studio's files for MiniMax-H3.

These files store query, key and value head by head. All others store the queries of all heads, then all keys,
then all values, in the same shape. As in diffusers, peft's `.default.` after a layer name of the original
code marks such a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from deployments.loras.format.header import shorten, unsupported

_FUSED = re.compile(r"(.*\.)?blocks\.\d+\.attn\.qkv_proj\.lora_B\.default\.weight")

_HEAD = 128
"""Outputs per head, in MiniMax-H3 of any size."""


def sort_by_projection(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors with the rows of these projections (3 x heads x 128) in the usual order.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) if the rows do not divide into heads.
    """
    return {name: _sort(name, up) if _FUSED.fullmatch(name) else up for name, up in tensors.items()}


def _sort(name: str, up: Tensor) -> Tensor:
    if up.ndim != 2 or up.shape[0] % (3 * _HEAD):
        shape = list(up.shape)
        raise unsupported(
            f"has {shorten(name)} of shape {shape}, which does not divide into heads of {_HEAD}"
        )
    return up.unflatten(0, (-1, 3, _HEAD)).transpose(0, 1).flatten(0, 2)
