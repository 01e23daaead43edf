"""Reads prompts as the trainer reads those of its sample pictures: flags in a prompt override fields.

A prompt ends at its first `--`. After each `--` comes the flag, up to the first space, then its value:
`a cat --w 512 --n blurry` is `a cat`, 512 pixels wide, with the negative prompt `blurry`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, ValidationError

from serve_app.wire.requests import LEAST_SIDE, MOST_SIDE, Guidance, Multiplier, Seed, Steps

_FlagSide = Annotated[int, Field(le=MOST_SIDE), AfterValidator(lambda side: max(side, LEAST_SIDE))]


class FlagError(ValueError):
    """A flag has an invalid value. The message is written for the client."""


class Flags(BaseModel):
    """The flags of a prompt. Values have the bounds of the fields that they override.

    Two flags override no field: `network_multiplier` applies to this prompt only, and `guidance_rescale` is
    for SDXL and has no bounds; other models ignore it.
    """

    neg: str | None = None
    width: _FlagSide | None = None
    height: _FlagSide | None = None
    seed: Seed | None = None
    guidance_scale: Guidance | None = None
    sample_steps: Steps | None = None
    network_multiplier: Multiplier | None = None
    guidance_rescale: FiniteFloat = 0.0

    @property
    def overrides(self) -> dict[str, Any]:
        """The overridden fields of the prompt, by name."""
        return self.model_dump(exclude_unset=True, exclude={"network_multiplier", "guidance_rescale"})


_FIELDS = {
    "n": "neg",
    "w": "width",
    "h": "height",
    "d": "seed",
    "seed": "seed",
    "l": "guidance_scale",
    "cfg": "guidance_scale",
    "s": "sample_steps",
    "steps": "sample_steps",
    "m": "network_multiplier",
    "network_multiplier": "network_multiplier",
    "gr": "guidance_rescale",
}
"""The field that each flag sets. Unknown flags are dropped; if two flags set one field, the last one wins."""


def read_prompt(text: str) -> tuple[str, Flags]:
    """Split a prompt into its text and its flags. Raises `FlagError`."""
    prompt, *parts = text.split("--")
    pairs = [part.partition(" ") for part in parts]
    values = {_FIELDS[flag]: value.strip() for flag, _, value in pairs if flag in _FIELDS}
    try:
        return prompt.strip(), Flags.model_validate(values)
    except ValidationError as error:
        faults = [f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors()]
        raise FlagError("; ".join(faults)) from None
