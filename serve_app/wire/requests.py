"""Bodies of requests: the wire format in, field for field as the reference server's, with our additions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.catalog import CATALOG
from deployments.spec.formats import OutputFormat
from deployments.spec.job import Resolution, Sampling

MAX_ITEMS = 1000
"""Longest `prompts` or `loras` list that is read at all; it bounds the work of reading a hostile body."""

UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""The form of the ids of requests and batches, a regular expression."""

MAX_PATH_CHARS = 4096
"""Linux's PATH_MAX: a longer path names no file."""


def _plain(value: str) -> str:
    """Refuse NUL, which paths and databases cannot hold, and lone surrogates, which are no text."""
    if "\x00" in value:
        raise PydanticCustomError("text_nul", "Text must not contain NUL characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text_surrogate", "Text must not contain lone surrogates") from None
    return value


_WITHOUT_NUL = Field(json_schema_extra={"pattern": r"^[^\x00]*$"})

Text = Annotated[str, AfterValidator(_plain), _WITHOUT_NUL]

LEAST_SIDE, MOST_SIDE = 64, 4096
"""Bounds of a picture's sides in pixels, as in the reference server; so are those that follow."""

Side = Annotated[int, Field(ge=LEAST_SIDE, le=MOST_SIDE)]
Guidance = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=150)]
Seed = Annotated[int, Field(ge=-1, lt=2**64)]
Multiplier = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Reference = Annotated[str, Field(max_length=MAX_PATH_CHARS), AfterValidator(_plain), _WITHOUT_NUL]

Token = Annotated[str, Field(max_length=1000, pattern=r"^[!-~]*$")]
"""What fits into an HTTP header."""


class _Part(BaseModel):
    """A part of a request: fields that are not known are ignored, only their names are kept."""

    # A text after a field is what the description of the API says of it.
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    @model_validator(mode="after")
    def _forget_unknown_values(self) -> Self:
        extra = self.model_extra or {}
        extra.update(dict.fromkeys(extra))
        return self


class LoraItem(_Part):
    """One LoRA of a request. `path` is relative to the LoRA root, or a reference to elsewhere."""

    path: Reference
    """A file below the LoRA root, or a URL."""
    transformer: Literal["low", "high"] | None = None
    """Which of two transformers it is for, where the model has two."""
    network_multiplier: Multiplier | None = None
    """Its weight; 1 by default."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$"), AfterValidator(str.lower)] | None = None
    """What the file must have, in hex."""


class PromptItem(_Part):
    """One picture or video of a request; null means the model's default. Control images: base64 or URLs."""

    prompt: Text
    """What to draw."""
    trigger_word: Text | None = None
    """Replaces `[trigger]` in the prompt; wins over the request's."""
    width: Side | None = None
    """Pixels, floored to the model's `resolution_divisor`."""
    height: Side | None = None
    """Pixels, floored to the model's `resolution_divisor`."""
    guidance_scale: Guidance | None = None
    """How strongly the prompt guides."""
    sample_steps: Steps | None = None
    """Denoising steps."""
    neg: Text | None = None
    """Negative prompt, empty by default."""
    seed: Seed | None = None
    """-1 draws one; absent: 42 and the index of the prompt."""
    sampler: Text | None = None
    """Ignored."""
    num_frames: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Of a video; brought to a number that the model can make."""
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    """Frames of a video shown in a second."""
    resolution: Resolution | None = None
    """`High` where the model has it: twice the width and height."""
    ctrl_img: str | None = None
    """Control image, base64 or a URL; only where no numbered one is sent."""
    ctrl_img_1: str | None = None
    """First control image, base64 or a URL."""
    ctrl_img_2: str | None = None
    """Second control image, base64 or a URL."""
    ctrl_img_3: str | None = None
    """Third control image, base64 or a URL."""

    @property
    def control_images(self) -> tuple[str | None, str | None, str | None, str | None]:
        """The control images as sent; a model chooses among them."""
        return self.ctrl_img, self.ctrl_img_1, self.ctrl_img_2, self.ctrl_img_3


class WebhookItem(_Part):
    """Where to tell that the request has ended; `events` are the states to tell of, all by default."""

    url: Annotated[Reference, Field(repr=False)]
    """Where to send the message."""
    events: Annotated[list[Literal["succeeded", "failed", "canceled"]], Field(min_length=1)] | None = None
    """The states to tell of, all of these by default."""


class RequestFields(_Part):
    """What holds for a whole request, beside its prompts."""

    model: Annotated[Text, Field(json_schema_extra={"enum": list(CATALOG)})]
    """An id of `GET /v1/models`."""
    loras: Annotated[list[LoraItem], Field(max_length=MAX_ITEMS)]
    """One LoRA; more where the model's `max_loras` says so."""
    trigger_word: Text | None = None
    """Replaces `[trigger]` in every prompt."""
    hf_token: Annotated[Token | None, Field(repr=False)] = None
    """Hub token for gated files; kept encrypted until the job has ended."""
    kv_cache: bool | None = None
    """Krea 2 edit: references attend to themselves alone; true by default."""
    match_target_res: bool | None = None
    """Krea 2 edit: references are scaled to the area of the output; true by default."""
    output_format: OutputFormat | None = None
    """`jpeg` by default; for videos the first of the model's `output_formats`."""
    sampling: Sampling | None = None
    """`preview` renders as the trainer's own sample pictures."""
    webhook: WebhookItem | None = None
    """Tell a server when the job has ended."""


class _Submission(_Part):
    """What is submitted under an `Idempotency-Key`."""

    @property
    def fingerprint(self) -> str:
        """Hash of what was asked: equal for bodies that differ only in layout, nulls or unknown fields."""
        canonical = self.model_dump_json(exclude_none=True, exclude_defaults=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class InferenceRequest(_Submission, RequestFields):
    """Body of `POST /v1/inference`."""

    prompts: Annotated[list[PromptItem], Field(min_length=1, max_length=MAX_ITEMS)]
    """One picture or video each, rendered in this order."""

    @property
    def unknown_fields(self) -> list[str]:
        """Names of the ignored fields, as `top`, `loras[0].item` and `prompts[0].item`."""
        parts = [("", self), *_named("loras", self.loras), *_named("prompts", self.prompts)]
        parts += [("webhook.", self.webhook)] if self.webhook else []
        return [f"{prefix}{name}" for prefix, part in parts for name in part.model_extra or {}]

    @property
    def has_images(self) -> bool:
        """Whether it brings control images, or names some."""
        return any(any(prompt.control_images) for prompt in self.prompts)


class BatchRequest(_Submission):
    """Body of `POST /v1/batches`; with the `batch_id` of an earlier call its requests join that batch."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[InferenceRequest], Field(min_length=1, max_length=MAX_ITEMS)]
    """Stored in this order, all of them or none."""
    batch_id: Annotated[str, Field(pattern=f"^{UUID}$")] | None = None
    """The batch that they join, by an id of your own; a new one without it."""


class InspectRequest(_Part):
    """Body of `POST /v1/loras/inspect`; `path` as in `LoraItem`."""

    path: Reference
    """A file below the LoRA root, or a URL."""
    hf_token: Annotated[Token | None, Field(repr=False)] = None
    """Hub token for a gated file; not kept."""


def _named(name: str, items: Sequence[_Part]) -> Iterable[tuple[str, _Part]]:
    return ((f"{name}[{index}].", item) for index, item in enumerate(items))
