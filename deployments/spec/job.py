"""The spec of a job: one model, its LoRAs, and its prompts with every default resolved.

It is stored as JSON. Workers of the next version must be able to read rows of this one.
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
"""How to sample: as the reference server renders requests, or as the trainer renders its sample images."""

_WEB = re.compile(r"https?://", re.IGNORECASE)


class LoraSpec(BaseModel):
    """One LoRA of a job and its multiplier (-2..2).

    `path` is stored as text and parsed once, when the spec is read. `sha256` is the hash that the file must
    have, in lower-case hex. `transformer` says which of the model's two transformers it is for.
    """

    model_config = ConfigDict(frozen=True)

    path: StoredReference
    multiplier: float = 1.0
    transformer: Literal["low", "high"] | None = None
    sha256: str | None = None


class PromptSpec(BaseModel):
    """One image or video of a job, with every default resolved.

    - `width` and `height` are pixels, already rounded down to the model's divisor. `resolution` "High"
      doubles both.
    - `seed` is in [0, 2**64).
    - `controls` are store keys or URLs of images.
    - `num_frames` and `fps` (frames per second) are for videos. `num_frames` is the requested number, which
      the model's rule rounds down; the sound may last longer.
    - `options` are the model's own switches.

    The last four fields are for previews:

    - `second_is_shown_only`: only the text encoder gets the second control image.
    - `multiplier`: the LoRAs' multiplier (-2..2), from a flag in the prompt, like the next two.
    - `guidance_rescale`: SDXL's (0..1).
    - `neg_2`: the negative prompt of SDXL's second text encoder, if it differs.
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
        """Key of the LoRA set. It leaves out URL queries, and multipliers, which cost nothing to change."""
        return "|".join(f"{lora.transformer or ''}:{lora.path.public}" for lora in self.loras)


def bare(url: str) -> str:
    """Return a control image's URL without its query, where presigned URLs carry their signature."""
    return url.partition("?")[0] if _WEB.match(url) else url


def split_secrets(spec: RenderSpec) -> tuple[RenderSpec, list[str]]:
    """Return the spec without the queries of its URLs, and the queries in order ([] if all are empty)."""
    controls = [control for prompt in spec.prompts for control in prompt.controls]
    queries = [lora.path.query for lora in spec.loras]
    queries += [control.removeprefix(bare(control)) for control in controls]
    return _with_queries(spec, repeat("")), queries if any(queries) else []


def join_secrets(spec: RenderSpec, queries: Sequence[str]) -> RenderSpec:
    """Put back the queries that `split_secrets` removed."""
    return _with_queries(spec, chain(queries, repeat("")))


def unseal(spec: RenderSpec, secret: str | None) -> tuple[RenderSpec, str | None]:
    """Return the spec as it was submitted, URL queries included, and the job's hub token.

    `secret` is the encrypted secret in the job's row. Raises `JobFailure` (SECRET_UNREADABLE).
    """
    secrets = open_secret(secret) if secret else {}
    return join_secrets(spec, secrets.get("queries", ())), secrets.get("hf_token")


def _with_queries(spec: RenderSpec, queries: Iterator[str]) -> RenderSpec:
    """Give each URL the next query ("?" included): LoRAs first, then control images."""
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
    """Remove `token` from `text`, including occurrences that only a removal creates."""
    while token in text:
        text = text.replace(token, "")
    return text
