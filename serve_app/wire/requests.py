"""Request bodies: the reference server's wire format field for field, plus our additions."""

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
"""Longest list of prompts, LoRAs or batched requests that is parsed; bounds the work for a hostile body."""

UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""Regular expression of the ids of requests and batches."""

MAX_PATH_CHARS = 4096
"""Linux's PATH_MAX: no file has a longer path."""


def _check_text(value: str) -> str:
    """Refuse NUL, which paths and databases cannot hold, and lone surrogates, which UTF-8 cannot encode."""
    if "\x00" in value:
        raise PydanticCustomError("text_nul", "Text must not contain NUL characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text_surrogate", "Text must not contain lone surrogates") from None
    return value


_WITHOUT_NUL = Field(json_schema_extra={"pattern": r"^[^\x00]*$"})

Text = Annotated[str, AfterValidator(_check_text), _WITHOUT_NUL]

LEAST_SIDE, MOST_SIDE = 64, 4096
"""Bounds of a side in pixels. All bounds here are the reference server's, except that of the largest seed."""

Side = Annotated[int, Field(ge=LEAST_SIDE, le=MOST_SIDE)]
Guidance = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=150)]
Seed = Annotated[int, Field(ge=-1, lt=2**64)]
Multiplier = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Reference = Annotated[str, Field(max_length=MAX_PATH_CHARS), AfterValidator(_check_text), _WITHOUT_NUL]

Token = Annotated[str, Field(max_length=1000, pattern=r"^[!-~]*$")]
"""Printable ASCII, so that it fits into an HTTP header."""


class _Part(BaseModel):
    """A part of a request. Unknown fields are ignored; only their names are kept."""

    # The string after a field is its description in /openapi.json.
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    @model_validator(mode="after")
    def _forget_unknown_values(self) -> Self:
        extra = self.model_extra or {}
        extra.update(dict.fromkeys(extra))
        return self


class LoraItem(_Part):
    """One LoRA of a request. `path` is relative to the LoRA root, or names a remote LoRA."""

    path: Reference
    """A file or PEFT folder below the LoRA root, or a URL (`https://`, `http://`, `hf://` or `s3://`)."""
    transformer: Literal["low", "high"] | None = None
    """Which transformer the LoRA is for, on models with two."""
    network_multiplier: Multiplier | None = None
    """Weight of the LoRA; 1 by default."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$"), AfterValidator(str.lower)] | None = None
    """SHA-256 that the file must have, in hex."""


class PromptItem(_Part):
    """One picture or video. Null means the model's default. Control images are base64 or URLs."""

    prompt: Text
    """What to draw."""
    trigger_word: Text | None = None
    """Replaces `[trigger]` in the prompt; overrides the request's trigger word."""
    width: Side | None = None
    """Pixels, rounded down to a multiple of the model's `resolution_divisor`."""
    height: Side | None = None
    """Pixels, rounded down to a multiple of the model's `resolution_divisor`."""
    guidance_scale: Guidance | None = None
    """Guidance scale: how closely the output follows the prompt."""
    sample_steps: Steps | None = None
    """Denoising steps."""
    neg: Text | None = None
    """Negative prompt, empty by default."""
    seed: Seed | None = None
    """-1: random. Absent: 42 plus the index of the prompt."""
    sampler: Text | None = None
    """Ignored."""
    num_frames: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Frames of a video, rounded to a number that the model can make."""
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    """Frames per second of a video."""
    resolution: Resolution | None = None
    """`High` doubles width and height, on models that support it."""
    ctrl_img: str | None = None
    """Control image, base64 or a URL; used if no numbered one is sent. Previews have other rules."""
    ctrl_img_1: str | None = None
    """First control image, base64 or a URL."""
    ctrl_img_2: str | None = None
    """Second control image, base64 or a URL."""
    ctrl_img_3: str | None = None
    """Third control image, base64 or a URL."""

    @property
    def control_images(self) -> tuple[str | None, str | None, str | None, str | None]:
        """The control images as sent; each model chooses from them."""
        return self.ctrl_img, self.ctrl_img_1, self.ctrl_img_2, self.ctrl_img_3


class WebhookItem(_Part):
    """Where to send a message when the request ends, and in which final states; in all of them by default."""

    url: Annotated[Reference, Field(repr=False)]
    """Receives the message as a POST."""
    events: Annotated[list[Literal["succeeded", "failed", "canceled"]], Field(min_length=1)] | None = None
    """Final states that send a message; all of these by default."""


class RequestFields(_Part):
    """The fields of a request, except its prompts."""

    model: Annotated[Text, Field(json_schema_extra={"enum": list(CATALOG)})]
    """An id of `GET /v1/models`."""
    loras: Annotated[list[LoraItem], Field(max_length=MAX_ITEMS)]
    """One LoRA, or more if the model's `max_loras` allows it."""
    trigger_word: Text | None = None
    """Replaces `[trigger]` in every prompt."""
    hf_token: Annotated[Token | None, Field(repr=False)] = None
    """Hugging Face token for gated files; stored encrypted until the job ends."""
    kv_cache: bool | None = None
    """Krea 2 edit: control images attend only to themselves; true by default."""
    match_target_res: bool | None = None
    """Krea 2 edit: control images are scaled to the area of the output; true by default."""
    output_format: OutputFormat | None = None
    """`jpeg` by default; for videos the first of the model's `output_formats`."""
    sampling: Sampling | None = None
    """`preview` renders as the trainer renders its sample pictures."""
    webhook: WebhookItem | None = None
    """Notifies a server when the job ends."""


class _Submission(_Part):
    """A body that can be sent with an `Idempotency-Key`."""

    @property
    def fingerprint(self) -> str:
        """Hash of the body; equal for bodies that differ only in layout, nulls or unknown fields."""
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
        """True if a prompt has a control image, inline or as a URL."""
        return any(any(prompt.control_images) for prompt in self.prompts)


class BatchRequest(_Submission):
    """Body of `POST /v1/batches`. With the `batch_id` of an earlier call, the requests join that batch."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[InferenceRequest], Field(min_length=1, max_length=MAX_ITEMS)]
    """The requests, stored in this order, all of them or none."""
    batch_id: Annotated[str, Field(pattern=f"^{UUID}$")] | None = None
    """Batch to add the requests to: any UUID that you choose. Without it the service creates a new batch."""


class InspectRequest(_Part):
    """Body of `POST /v1/loras/inspect`; `path` as in `LoraItem`."""

    path: Reference
    """A file or PEFT folder below the LoRA root, or a URL (`https://`, `http://`, `hf://` or `s3://`)."""
    hf_token: Annotated[Token | None, Field(repr=False)] = None
    """Hugging Face token for a gated file; not stored."""


def _named(name: str, items: Sequence[_Part]) -> Iterable[tuple[str, _Part]]:
    return ((f"{name}[{index}].", item) for index, item in enumerate(items))
