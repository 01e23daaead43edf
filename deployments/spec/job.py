"""The spec of a job: one model, its LoRAs, and its prompts with every default resolved.

It is stored as JSON, so rows of one version are read by workers of the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.secrets import open_secret
from deployments.spec.formats import OutputFormat
from deployments.spec.lora_reference import StoredReference

Resolution = Literal["Default", "High"]

Sampling = Literal["reference", "preview"]
"""As the reference server renders a request, or as the trainer renders its sample pictures."""

_WEB = re.compile(r"https?://", re.IGNORECASE)


class LoraSpec(BaseModel):
    """One LoRA of a job, and the weight it is applied with (-2..2).

    `path` is stored as the reference's text, and parsed once when the spec is read. `sha256` is what the file
    must have, in lower case hex.
    """

    model_config = ConfigDict(frozen=True)

    path: StoredReference
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
        """Key of the LoRA set. Multipliers, which change for free, and URL queries are not part of it."""
        return "|".join(f"{lora.transformer or ''}:{lora.path.public}" for lora in self.loras)


def bare(url: str) -> str:
    """Return a control image's URL without its query, where presigned URLs carry their signature."""
    return url.partition("?")[0] if _WEB.match(url) else url


def split_secrets(spec: RenderSpec) -> tuple[RenderSpec, list[str]]:
    """Take the queries out of a job's URLs; return them in order, or nothing if all are empty."""
    controls = [control for prompt in spec.prompts for control in prompt.controls]
    queries = [lora.path.query for lora in spec.loras]
    queries += [control.removeprefix(bare(control)) for control in controls]
    return _with_queries(spec, repeat("")), queries if any(queries) else []


def join_secrets(spec: RenderSpec, queries: Sequence[str]) -> RenderSpec:
    """Put back what `split_secrets` took out."""
    return _with_queries(spec, chain(queries, repeat("")))


def unseal(spec: RenderSpec, secret: str | None) -> tuple[RenderSpec, str | None]:
    """Return a job as it was submitted, queries included, and its hub token.

    `secret` is that of the job's row. Raises `JobFailure` (SECRET_UNREADABLE).
    """
    secrets = open_secret(secret) if secret else {}
    return join_secrets(spec, secrets.get("queries", ())), secrets.get("hf_token")


def _with_queries(spec: RenderSpec, queries: Iterator[str]) -> RenderSpec:
    """Give each URL the next query, "?" included: first those of the LoRAs, then the control images'."""
    loras = tuple(
        lora.model_copy(update={"path": lora.path.with_query(next(queries))}) for lora in spec.loras
    )
    prompts = tuple(
        prompt.model_copy(
            update={"controls": tuple(bare(control) + next(queries) for control in prompt.controls)}
        )
        for prompt in spec.prompts
    )
    return spec.model_copy(update={"loras": loras, "prompts": prompts})


def without(text: str, token: str) -> str:
    """Return a text without a token, not even where the removal of one would put another together."""
    while token in text:
        text = text.replace(token, "")
    return text
