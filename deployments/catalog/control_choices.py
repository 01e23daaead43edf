"""Which of the control images that a prompt sends a model takes, in which order.

Each rule gets the four fields `ctrl_img`, `ctrl_img_1`, `ctrl_img_2` and `ctrl_img_3`, of which any may be
absent. The reference server has one rule; the trainer's previews have others, by model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen images in order; `second_is_shown_only`: the second one goes to the text encoder alone."""

    images: tuple[str, ...]
    second_is_shown_only: bool = False


Choose: TypeAlias = Callable[[Sequence[str | None]], Choice]


def numbered_else_main(fields: Sequence[str | None]) -> Choice:
    """Choose the numbered ones, else `ctrl_img`: the reference server's rule."""
    main, *numbered = fields
    return Choice(_there(*numbered) or _there(main))


def only_one(fields: Sequence[str | None]) -> Choice:
    """As `numbered_else_main`, but none of several: the reference server then goes by the text alone."""
    choice = numbered_else_main(fields)
    return choice if len(choice.images) == 1 else Choice(())


def first(fields: Sequence[str | None]) -> Choice:
    """Choose one image, the first that is there."""
    return Choice(_there(*fields)[:1])


def first_as_sent(fields: Sequence[str | None]) -> Choice:
    """Choose one image, the first of `numbered_else_main`."""
    return Choice(numbered_else_main(fields).images[:1])


def main_only(fields: Sequence[str | None]) -> Choice:
    """Choose `ctrl_img` and no other."""
    return Choice(_there(fields[0]))


def main_in_front(fields: Sequence[str | None]) -> Choice:
    """Choose `ctrl_img`, which takes the place of `ctrl_img_1`, then the others."""
    main, one, *others = fields
    return Choice(_there(main or one, *others))


def main_shown_twice(fields: Sequence[str | None]) -> Choice:
    """As `main_in_front`, but the text encoder sees `ctrl_img_1` too, or `ctrl_img` again in its place."""
    main, one, *others = fields
    return Choice(_there(main, one or main, *others), second_is_shown_only=bool(main))


def _there(*fields: str | None) -> tuple[str, ...]:
    return tuple(image for image in fields if image)
