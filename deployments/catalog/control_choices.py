"""Rules for which of a prompt's control images a model uses, and in which order.

Each rule gets the four fields `ctrl_img`, `ctrl_img_1`, `ctrl_img_2` and `ctrl_img_3`; any can be absent. The
reference server has one rule; the trainer's previews have others, depending on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen images in order; with `second_is_shown_only`, only the text encoder sees the second one."""

    images: tuple[str, ...]
    second_is_shown_only: bool = False


Choose: TypeAlias = Callable[[Sequence[str | None]], Choice]


def numbered_else_main(fields: Sequence[str | None]) -> Choice:
    """Choose the numbered images, otherwise `ctrl_img`. This is the reference server's rule."""
    main, *numbered = fields
    return Choice(_there(*numbered) or _there(main))


def only_one(fields: Sequence[str | None]) -> Choice:
    """As `numbered_else_main`, but none of several: the reference server then uses only the text."""
    choice = numbered_else_main(fields)
    return choice if len(choice.images) == 1 else Choice(())


def first(fields: Sequence[str | None]) -> Choice:
    """Choose the first image that is present."""
    return Choice(_there(*fields)[:1])


def first_as_sent(fields: Sequence[str | None]) -> Choice:
    """Choose the first image of `numbered_else_main`."""
    return Choice(numbered_else_main(fields).images[:1])


def main_only(fields: Sequence[str | None]) -> Choice:
    """Choose only `ctrl_img`."""
    return Choice(_there(fields[0]))


def main_in_front(fields: Sequence[str | None]) -> Choice:
    """Choose `ctrl_img`, which replaces `ctrl_img_1`, then the others."""
    main, one, *others = fields
    return Choice(_there(main or one, *others))


def main_shown_twice(fields: Sequence[str | None]) -> Choice:
    """As `main_in_front`, but the text encoder also sees `ctrl_img_1`, or else `ctrl_img` a second time."""
    main, one, *others = fields
    return Choice(_there(main, one or main, *others), second_is_shown_only=bool(main))


def _there(*fields: str | None) -> tuple[str, ...]:
    return tuple(image for image in fields if image)
