"""Contact sheets: many thumbnails in one picture, each with lines of text below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 8
FONT_PX = 12
LINE_PX = 16
PAPER, INK, BLANK = "white", "black", "lightgrey"


@dataclass(frozen=True)
class Tile:
    """A picture, or a word in its place, and the lines of its label."""

    picture: Image.Image | str
    label: Sequence[str]


def contact_sheet(tiles: Sequence[Tile], columns: int, side: int) -> Image.Image:
    """Return the tiles in rows of `columns`, as RGB; pictures are at most `side` pixels wide and high.

    Raises `ValueError` for no tiles, or less than one column.
    """
    if not tiles or columns < 1:
        raise ValueError("a contact sheet needs at least one picture and one column")
    columns = min(columns, len(tiles))
    lines = max(len(tile.label) for tile in tiles)
    width, height = side + GAP, side + GAP + lines * LINE_PX
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), PAPER)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        _draw(sheet, tile, GAP + column * width, GAP + row * height, side)
    return sheet


def _draw(sheet: Image.Image, tile: Tile, left: int, top: int, side: int) -> None:
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    if isinstance(tile.picture, str):
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=BLANK)
        draw.text((left + side // 2, top + side // 2), _fitting(tile.picture, side), INK, font, anchor="mm")
    else:
        spare = side - tile.picture.width, side - tile.picture.height
        sheet.paste(tile.picture, (left + spare[0] // 2, top + spare[1] // 2))
    for number, line in enumerate(tile.label):
        draw.text((left, top + side + number * LINE_PX), _fitting(line, side), INK, font)


def _fitting(text: str, width: int) -> str:
    """Cut a line to `width` pixels; a line that was cut ends in `...`."""
    font = ImageFont.load_default(FONT_PX)
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
