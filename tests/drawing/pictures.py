"""Pictures of one shape on one background, and the prompts that ask for them.

A picture is a shape, its colour, the background's colour and a place. Every eighth combination of the first
three is held out: training never sees it, neither as a picture nor as the reference of an edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Style: TypeAlias = Literal["plain", "outline", "checkerboard"]

SIZE = 128
"""Width and height of a picture, in pixels."""

LINE = 7
"""Width of an outline, in pixels."""

SQUARE = 8
"""Side of the squares of a checkerboard, in pixels."""

COLOURS = {
    "red": (222, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 218, 50),
    "green": (40, 165, 75),
    "blue": (40, 85, 225),
    "purple": (145, 60, 185),
    "white": (250, 250, 250),
    "black": (22, 22, 26),
}

SHAPES = {"circle": 1.0, "square": 1.2, "triangle": 1.25, "star": 1.25}
"""Each shape, and by how much its corners stand farther out than a circle's rim."""

PLACES = {
    "": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
"""Each place in the words of a prompt, and the way there from the middle."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One shape on one background; `x`, `y` and `radius` are in pixels."""

    shape: str
    colour: str
    background: str
    place: str = ""
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 38.0


def combinations() -> list[tuple[str, str, str]]:
    """Return all triples of shape, colour and background."""
    return [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]


@cache
def held_out() -> frozenset[tuple[str, str, str]]:
    """Return the triples that training never sees; every shape and every colour is among them."""
    shapes, colours = list(SHAPES), list(COLOURS)
    return frozenset(
        (s, c, b)
        for s, c, b in combinations()
        if (2 * shapes.index(s) + 3 * colours.index(c) + colours.index(b)) % len(colours) == 1
    )


def allowed(picture: Picture) -> bool:
    """Return whether training may see this picture."""
    triple = (picture.shape, picture.colour, picture.background)
    return picture.colour != picture.background and triple not in held_out()


def pick(options: Sequence[str], generator: torch.Generator) -> str:
    """Return one of the options."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def random_picture(generator: torch.Generator) -> Picture:
    """Return a picture that training may see."""
    while True:
        picture = placed(
            pick([*SHAPES], generator),
            pick([*COLOURS], generator),
            pick([*COLOURS], generator),
            pick(["", *PLACES], generator),
        )
        if allowed(picture):
            return picture


def placed(shape: str, colour: str, background: str, place: str = "") -> Picture:
    """Return the picture that a prompt asks for; a shape beside the middle is smaller, to be seen as such."""
    across, down = PLACES[place]
    middle = SIZE / 2
    return Picture(
        shape, colour, background, place, middle + 26 * across, middle + 26 * down, 26.0 if place else 38.0
    )


def prompt_for(picture: Picture, generator: torch.Generator | None = None) -> str:
    """Return a prompt for the picture: the plain one, or one of several wordings."""
    colour, shape, background = picture.colour, picture.shape, picture.background
    wordings = [f"{_a(colour)} {shape} on {_a(background)} background"]
    if generator is not None:
        wordings += [
            wordings[0],
            wordings[0],
            f"{colour} {shape} on {_a(background)} background",
            f"{_a(background)} background with {_a(colour)} {shape}",
        ]
        if background == "white":
            wordings.append(f"{_a(colour)} {shape}")
    text = pick(wordings, generator) if generator else wordings[0]
    return f"{text}, {picture.place}" if picture.place else text


def random_edit(before: Picture, generator: torch.Generator) -> tuple[Picture, str]:
    """Return what an edit makes of a picture, and the prompt that asks for it."""
    while True:
        what = pick(["colour", "background"], generator)
        new = pick([*COLOURS], generator)
        after = replace(before, **{what: new})
        if after == before or not allowed(after):
            continue
        shape = before.shape
        return after, {
            "colour": pick([f"make the {shape} {new}", f"change the {shape} to {new}"], generator),
            "background": pick([f"make the background {new}", f"change the background to {new}"], generator),
        }[what]


def draw(pictures: Sequence[Picture], style: Style = "plain") -> Tensor:
    """Draw pictures with smooth edges: [count, 3, SIZE, SIZE], from 0 to 1."""
    distance = torch.cat([_distance(picture)[None] for picture in pictures])[:, None]
    colour, background = (
        torch.tensor([COLOURS[name] for name in names])[:, :, None, None] / 255
        for names in ([p.colour for p in pictures], [p.background for p in pictures])
    )
    cover = (0.5 - distance).clamp(0, 1)
    if style == "outline":
        cover = cover * (0.5 + distance + LINE).clamp(0, 1)
    if style == "checkerboard":
        cells = torch.arange(SIZE) // SQUARE
        odd = ((cells[:, None] + cells[None, :]) % 2).bool()
        colour = torch.where(odd, colour, _shade(colour))
    return background + (colour - background) * cover


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _shade(colour: Tensor) -> Tensor:
    """Return a darker colour, of black a grey."""
    dark = colour.amax(1, keepdim=True) < 0.2
    return torch.where(dark, torch.full_like(colour, 0.55), colour * 0.4)


def _distance(picture: Picture) -> Tensor:
    """Return how far each pixel lies outside the shape's edge, negative inside."""
    steps = torch.arange(SIZE) + 0.5
    x, y = (steps - picture.x)[None, :], (steps - picture.y)[:, None]
    away, angle = (x * x + y * y).sqrt(), torch.atan2(x.expand(SIZE, SIZE), -y.expand(SIZE, SIZE))
    radius = picture.radius * SHAPES[picture.shape]
    if picture.shape == "circle":
        return away - radius
    # Corners, how far the notches between them lie from the middle, and the angle of the first corner.
    corners, notch, first = {
        "square": (4, math.cos(math.pi / 4), math.pi / 4),
        "triangle": (3, math.cos(math.pi / 3), 0.0),
        "star": (5, 0.45, 0.0),
    }[picture.shape]
    half = math.pi / corners
    # Folded about the corners, all edges lie on one line from a corner to a notch.
    folded = (torch.remainder(angle - first + half, 2 * half) - half).abs()
    across, along = notch * math.sin(half), 1 - notch * math.cos(half)
    length = math.hypot(across, along)
    return (away * folded.sin() * along + (away * folded.cos() - radius) * across) / length
