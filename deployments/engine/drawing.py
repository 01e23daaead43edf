"""A tiny FLUX.1 that draws one coloured shape on a background, as the prompt says.

Its weights are files of this package. `tests/drawing` trained them from scratch. Pictures and the references
of edits are 128x128 pixels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

DRAWING_FLUX = Path(__file__).parent / "drawing_flux"
"""A FluxPipeline of bfloat16 weights; its LoRAs are in `loras`."""


def write_drawing_checkpoints(target: Path) -> None:
    """Write the checkpoint as FLUX.1-dev and FLUX.1-Kontext-dev, in `org--name` folders below `target`."""
    for name, pipeline in (("FLUX.1-dev", "FluxPipeline"), ("FLUX.1-Kontext-dev", "FluxKontextPipeline")):
        folder = target / f"black-forest-labs--{name}"
        shutil.copytree(DRAWING_FLUX, folder, ignore=shutil.ignore_patterns("loras"), dirs_exist_ok=True)
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": pipeline}, indent=2))


def write_drawing_loras(target: Path) -> None:
    """Write `outline.safetensors` and `checkerboard.safetensors` below `target`."""
    shutil.copytree(DRAWING_FLUX / "loras", target, dirs_exist_ok=True)
