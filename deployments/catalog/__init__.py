"""The model catalogue: one frozen row per model id, one module per family. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from deployments.catalog import (
    chroma,
    flux,
    flux2,
    hidream,
    krea2,
    ltx2,
    lumina2,
    minimax,
    omnigen2,
    qwen_image,
    sd,
    wan,
    zimage,
)
from deployments.catalog.model_spec import (
    Checkpoint,
    ControlImages,
    HighResolution,
    ModelSpec,
    Part,
    Preview,
    Video,
)

__all__ = [
    "CATALOG",
    "Checkpoint",
    "ControlImages",
    "HighResolution",
    "ModelSpec",
    "Part",
    "Preview",
    "Video",
]

_FAMILIES = (
    flux,
    chroma,
    flux2,
    sd,
    zimage,
    qwen_image,
    lumina2,
    krea2,
    hidream,
    omnigen2,
    wan,
    ltx2,
    minimax,
)

CATALOG: Mapping[str, ModelSpec] = MappingProxyType(
    {row.id: row for family in _FAMILIES for row in family.ROWS}
)
"""All models of this service by id, in catalogue order."""
