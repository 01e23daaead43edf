"""Files of DiffSynth-Studio for MiniMax-H3, whose fused projections have query, key and value head by head.

All others have the queries of all heads, their keys, their values, in the same shape. These files are told by
peft's `.default.` in the original code's names, as diffusers tells them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from deployments.loras.format.header import shorten, unsupported

_FUSED = re.compile(r"(.*\.)?blocks\.\d+\.attn\.qkv_proj\.lora_B\.default\.weight")

_HEAD = 128
"""Outputs of a head of MiniMax-H3, whichever its size."""


def sort_by_projection(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors with the rows of such projections (3 x heads x 128) in the others' order.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) where they are no whole heads.
    """
    return {name: _sort(name, up) if _FUSED.fullmatch(name) else up for name, up in tensors.items()}


def _sort(name: str, up: Tensor) -> Tensor:
    if up.ndim != 2 or up.shape[0] % (3 * _HEAD):
        raise unsupported(f"has {shorten(name)} of shape {list(up.shape)}, which is not by heads of {_HEAD}")
    return up.unflatten(0, (-1, 3, _HEAD)).transpose(0, 1).flatten(0, 2)
