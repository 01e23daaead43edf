"""Finds the shape, its colour and the background in a picture, from pixels alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.drawing.pictures import COLOURS, SHAPES, SIZE, Picture, draw

_SURE = 0.8
"""Lowest intersection over union with the ideal shape that counts as that shape."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows; `shape` is empty where no shape fits. `x`, `y`, `radius` are in pixels."""

    shape: str
    colour: str
    background: str
    x: float
    y: float
    radius: float
    fit: float


def judge(image: Tensor) -> Seen:
    """Judge a picture [3, SIZE, SIZE] from 0 to 1, its shape filled evenly."""
    palette = torch.tensor(list(COLOURS.values())) / 255
    names = list(COLOURS)
    far = (image[None] - palette[:, :, None, None]).square().sum(1)
    nearest = far.argmin(0)
    rim = torch.cat([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    background = int(rim.mode().values)
    counts = torch.bincount(nearest.flatten(), minlength=len(names))
    counts[background] = 0
    colour = int(counts.argmax())
    shape, x, y, radius, fit = _shape(far[colour] < far[background])
    return Seen(shape if fit > _SURE else "", names[colour], names[background], x, y, radius, fit)


def _shape(mask: Tensor) -> tuple[str, float, float, float, float]:
    """Return the shape that fits best in the mask's bounding box, its middle, its radius and its fit."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return "", 0.0, 0.0, 0.0, 0.0
    top, left = float(rows[0]), float(columns[0])
    height, width = float(rows[-1]) + 1 - top, float(columns[-1]) + 1 - left
    best = ("", 0.0, 0.0, 0.0, 0.0)
    for shape in SHAPES:
        # The box of the shape at radius 1 gives the position of the middle and the scale.
        box_left, box_top, box_width, box_height = _box(shape)
        radius = (width / box_width + height / box_height) / 2
        x = left + width / 2 - radius * (box_left + box_width / 2)
        y = top + height / 2 - radius * (box_top + box_height / 2)
        ideal = draw([Picture(shape, "white", "black", x=x, y=y, radius=radius)])[0, 0] > 0.5
        fit = float((ideal & mask).sum() / (ideal | mask).sum())
        if fit > best[-1]:
            best = (shape, x, y, radius, fit)
    return best


def _box(shape: str) -> tuple[float, float, float, float]:
    """Return left, top, width and height of a shape of radius 1 around the origin."""
    radius = SIZE / 4
    mask = draw([Picture(shape, "white", "black", radius=radius)])[0, 0] > 0.5
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    left, top = float(columns[0]) - SIZE / 2, float(rows[0]) - SIZE / 2
    width, height = len(columns), len(rows)
    return left / radius, top / radius, width / radius, height / radius


def hollow(image: Tensor, seen: Seen) -> bool:
    """Return whether the middle of the shape shows the background."""
    palette = {name: torch.tensor(rgb) / 255 for name, rgb in COLOURS.items()}
    colour, background = palette[seen.colour], palette[seen.background]
    y, x = round(seen.y), round(seen.x)
    middle = image[:, y - 4 : y + 4, x - 4 : x + 4].mean((1, 2))
    return bool((middle - background).norm() < (middle - colour).norm())


def alternations(image: Tensor, seen: Seen) -> int:
    """Return how often light and dark alternate on a line across the middle of the shape."""
    y, x, half = round(seen.y), round(seen.x), round(seen.radius * 0.8)
    line = image[:, y - 1 : y + 2, max(0, x - half) : x + half].mean((0, 1))
    if float(line.max() - line.min()) < 0.08:
        return 0
    light = line > (line.max() + line.min()) / 2
    return int((light[1:] != light[:-1]).sum())
