"""Renames the tensors of files in a model's original naming, by diffusers' own converters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deployments.loras.dialects import Role, group

logger = logging.getLogger(__name__)


def rename(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ANN401 - any pipeline
    """Return the tensors under diffusers' names, or as they are where diffusers does not know the naming.

    Alphas are multiplied into the matrices first, in float32: the converters treat them each in its own way.
    """
    folded = _fold_alphas(tensors)
    options = {"unet_config": pipeline.unet.config} if "unet" in pipeline.components else {}
    try:
        converted = type(pipeline).lora_state_dict(dict(folded), **options)
    except Exception:
        # The converters meet names that nobody has foreseen; what they raise is no answer for a client.
        logger.info("diffusers knows no conversion for a LoRA", exc_info=True)
        return folded
    return converted[0] if isinstance(converted, tuple) else converted


def _fold_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    folded = dict(tensors)
    for names in group({name: name for name in tensors}).values():
        if names.keys() == {Role.DOWN, Role.UP, Role.ALPHA}:
            alpha, rank = folded.pop(names[Role.ALPHA]), folded[names[Role.DOWN]].shape[0]
            folded[names[Role.UP]] = folded[names[Role.UP]].float() * (alpha.float() / max(rank, 1))
    return folded
