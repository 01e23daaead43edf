"""What `lora-serve demo` renders: the drawing FLUX with two LoRAs, or your own model, LoRA and prompt."""

from __future__ import annotations

import base64
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from deployments.catalog import CATALOG

SIDE = 128
"""Width and height of the drawing FLUX's pictures, in pixels."""

PROMPT = "a green triangle on a purple background"

EDIT = "make the triangle orange"

LORAS = ("outline", "checkerboard")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the demo: the name of its pictures, their caption, and the body that is posted."""

    name: str
    caption: str
    body: dict[str, Any]


def own_request(folder: Path, model: str, lora: Path, prompt: str, image: Path | None) -> Request:
    """Build a request for a real checkpoint; the LoRA is copied below the demo's LoRA root."""
    root = folder / "loras"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(lora, root / lora.name)
    item: dict[str, Any] = {"prompt": prompt}
    if image is not None:
        item["ctrl_img"] = base64.b64encode(image.read_bytes()).decode()
    body = {"model": model, "loras": [{"path": lora.name}], "prompts": [item]}
    if CATALOG[model].video is None:
        body["output_format"] = "png"
    return Request(model, lora.stem, body)


def drawing_requests(folder: Path) -> list[Request]:
    """Write the drawing FLUX and its LoRAs below `folder`; return the requests in the order of the sheet."""
    from deployments.engine.drawing import write_drawing_checkpoints, write_drawing_loras

    write_drawing_checkpoints(folder / "checkpoints")
    write_drawing_loras(folder / "loras")
    # A request needs a LoRA; with multiplier 0 the picture is the one without.
    requests = [_drawing("plain", "without LoRA", LORAS[0], 0.0)]
    for lora in LORAS:
        for multiplier in (1.0, 0.5):
            requests.append(_drawing(f"{lora}-{multiplier}", f"{lora} {multiplier}", lora, multiplier))
    edit = _drawing("edit", f"edit: {EDIT}", LORAS[0], 0.0, EDIT)
    edit.body["model"] = "flux_kontext"
    edit.body["prompts"][0]["ctrl_img"] = _control_image()
    return [*requests, edit]


def _drawing(name: str, caption: str, lora: str, multiplier: float, prompt: str = PROMPT) -> Request:
    body = {
        "model": "flux",
        "loras": [{"path": f"{lora}.safetensors", "network_multiplier": multiplier}],
        "prompts": [{"prompt": prompt, "width": SIDE, "height": SIDE}],
        "output_format": "png",
    }
    return Request(name, caption, body)


def _control_image() -> str:
    """Draw the picture to edit, a green triangle on purple; return it as base64 of a PNG."""
    picture = Image.new("RGB", (SIDE, SIDE), (145, 60, 185))
    corners = [(64.0, 16.5), (105.1, 87.75), (22.9, 87.75)]
    ImageDraw.Draw(picture).polygon(corners, fill=(40, 165, 75))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
