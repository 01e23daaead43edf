"""The pictures of `lora-serve demo` side by side: as a contact sheet, and in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.color import Color
from rich.columns import Columns
from rich.console import Console, Group
from rich.style import Style
from rich.text import Text

from serve_app.batch.contact_sheet import Tile, contact_sheet
from serve_app.cli.demo_requests import Request

SHEET = "sheet.png"

SIDE = 192
"""Side of a picture on the sheet, in pixels."""

COLUMNS = 24
"""Width of a thumbnail in characters; each character shows two pixels, one above the other."""


def show(console: Console, requests: Sequence[Request], pictures: Path) -> None:
    """Write the sheet of the pictures and, on a terminal with colours, print their thumbnails.

    Requests whose picture is no PNG, such as videos, are left out.
    """
    files = [(request, pictures / f"{request.name}-0.png") for request in requests]
    images = [(request, Image.open(file).convert("RGB")) for request, file in files if file.exists()]
    if not images:
        return
    scaled = [_scaled(image, SIDE) for _, image in images]
    tiles = [Tile(image, [request.caption]) for image, (request, _) in zip(scaled, images, strict=True)]
    contact_sheet(tiles, columns=len(tiles), side=SIDE).save(pictures / SHEET)
    if console.is_terminal and console.color_system:
        console.print(Columns(Group(_thumbnail(image), request.caption) for request, image in images))


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """Return the image with its longer side of `side` pixels."""
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _thumbnail(image: Image.Image) -> Text:
    """Return the image as text: each half block has the colours of two pixels, one above the other."""
    pixels = np.asarray(_scaled(image, COLUMNS))
    text = Text()
    for upper, lower in zip(pixels[0::2], pixels[1::2], strict=False):
        for above, below in zip(upper, lower, strict=True):
            style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
            text.append("\N{UPPER HALF BLOCK}", style)
        text.append("\n")
    return text
