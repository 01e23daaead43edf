"""What a job asks for, fully resolved: the JSON that admission writes into the job table and workers read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.secrets import open_secret

ImageFormat = Literal["jpeg", "png", "webp"]

VideoFormat = Literal["webp", "mp4"]

OutputFormat = Literal[ImageFormat, VideoFormat]

Resolution = Literal["Default", "High"]

Sampling = Literal["reference", "preview"]
"""As the reference server renders a request, or as the trainer renders its sample pictures."""

_WEB = re.compile(r"https?://", re.IGNORECASE)


class LoraSpec(BaseModel):
    """One LoRA of a job, and the weight it is applied with (-2..2).

    `path` is a path below the LoRA root or a reference to elsewhere, in the one form of
    `deployments.loras.sources.lora_root`; `sha256` is what the file must have, in lower case hex.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    multiplier: float = 1.0
    transformer: Literal["low", "high"] | None = None
    sha256: str | None = None


class PromptSpec(BaseModel):
    """One picture or video of a job, every default resolved; `controls` are store keys or URLs of images.

    Width and height are pixels, already floored to the model's divisor; `seed` is in [0, 2**64). `options`
    are the model's own switches. `resolution` "High" doubles width and height. Videos have `num_frames` as
    asked for, which the model's rule floors (its sound may last longer), and frames a second. The last four
    are of previews: whether the second control image is for the text encoder only, and what a prompt's flags
    say that has no field: the LoRAs' weight (-2..2), SDXL's guidance rescale (0..1), and the negative prompt
    of its second text encoder where it is another.
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    neg: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    controls: tuple[str, ...] = ()
    num_frames: int | None = None
    fps: int | None = None
    options: dict[str, bool] = {}
    resolution: Resolution = "Default"
    sampling: Sampling = "reference"
    second_is_shown_only: bool = False
    multiplier: float | None = None
    guidance_rescale: float = 0.0
    neg_2: str | None = None


class RenderSpec(BaseModel):
    """A whole job: one model, its LoRAs, and one or more prompts that run one after another."""

    model_config = ConfigDict(frozen=True)

    model: str
    loras: tuple[LoraSpec, ...]
    prompts: tuple[PromptSpec, ...]
    output_format: OutputFormat = "jpeg"
    warnings: tuple[str, ...] = ()

    @property
    def adapter(self) -> str:
        """The identity of the job's LoRA set, multipliers left out: they change for free. Without secrets."""
        return "|".join(f"{lora.transformer or ''}:{bare(lora.path)}" for lora in self.loras)


def bare(reference: str) -> str:
    """Return a reference without its query if it is a URL: presigned URLs carry their signature there."""
    return reference.partition("?")[0] if _WEB.match(reference) else reference


def split_secrets(spec: RenderSpec) -> tuple[RenderSpec, list[str]]:
    """Take the queries out of a job's URLs; returns them in order, or nothing if all are empty."""
    queries: list[str] = []

    def cut(reference: str) -> str:
        queries.append(reference.removeprefix(bare(reference)))
        return bare(reference)

    without = _change_references(spec, cut)
    return without, queries if any(queries) else []


def join_secrets(spec: RenderSpec, queries: Sequence[str]) -> RenderSpec:
    """Put back what `split_secrets` took out."""
    rest = iter(queries)
    return _change_references(spec, lambda reference: reference + next(rest, ""))


def unseal(spec: RenderSpec, secret: str | None) -> tuple[RenderSpec, str | None]:
    """Return a job as it was submitted, queries included, and its hub token.

    `secret` is that of the job's row. Raises `JobFailure` (SECRET_UNREADABLE).
    """
    secrets = open_secret(secret) if secret else {}
    return join_secrets(spec, secrets.get("queries", ())), secrets.get("hf_token")


def _change_references(spec: RenderSpec, change: Callable[[str], str]) -> RenderSpec:
    loras = tuple(lora.model_copy(update={"path": change(lora.path)}) for lora in spec.loras)
    prompts = tuple(
        prompt.model_copy(update={"controls": tuple(change(control) for control in prompt.controls)})
        for prompt in spec.prompts
    )
    return spec.model_copy(update={"loras": loras, "prompts": prompts})


def without(text: str, token: str) -> str:
    """Return a text without a token, not even where the removal of one would put another together."""
    while token in text:
        text = text.replace(token, "")
    return text
