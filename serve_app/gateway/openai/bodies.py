"""Request and response bodies of OpenAI's image routes: OpenAI's fields plus all of ours."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.catalog import CATALOG
from deployments.spec.formats import ImageFormat
from serve_app.wire.requests import (
    MAX_ITEMS,
    InferenceRequest,
    LoraItem,
    PromptItem,
    RequestFields,
    Side,
    Text,
)

MAX_PICTURES = 10
"""Limit of `n`, as for OpenAI."""

NUMBERED = ("ctrl_img_1", "ctrl_img_2", "ctrl_img_3")
"""The fields of a prompt that hold several images to edit."""

EXAMPLE: dict[str, Any] = {
    "model": "flux",
    "prompt": "[trigger], a red fox in the snow",
    "size": "1024x768",
    "n": 2,
    "loras": [{"path": "my_style.safetensors", "network_multiplier": 0.8}],
    "trigger_word": "p5x",
}

_MODELS = [row for row in CATALOG.values() if not row.video]

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def _read_size(value: Any) -> tuple[str, str] | None:  # noqa: ANN401 - any JSON
    """Return width and height for `1024x768`, None for `auto` or null."""
    if value is None or value == "auto":
        return None
    size = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if size is None:
        raise PydanticCustomError("size", 'Size must be "auto" or WIDTHxHEIGHT in pixels')
    return size[1], size[2]


Size = Annotated[
    tuple[Side, Side] | None,
    BeforeValidator(_read_size),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string", "pattern": f"^(auto|{_SIZE.pattern})$"}, {"type": "null"}],
        }
    ),
]


def _not_streamed(value: bool) -> bool:
    if value:
        raise PydanticCustomError("stream", "Streaming is not supported; leave `stream` out")
    return value


class ImageGeneration(RequestFields, PromptItem):
    """Body of `POST /v1/images/generations`: OpenAI's fields, and any field of our requests.

    `n` pictures are `n` prompts. Their seeds count up from `seed`; with -1 each seed is random.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: Annotated[Text, Field(json_schema_extra={"enum": [row.id for row in _MODELS]})]
    """An id of `GET /v1/models` that makes pictures."""
    loras: Annotated[list[LoraItem], Field(max_length=MAX_ITEMS, default_factory=list)]
    """Required: one LoRA, or more if the model's `max_loras` allows it."""
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = None
    """Number of pictures, 1 by default. Seeds count up from `seed`."""
    size: Size = None
    """`WIDTHxHEIGHT` in pixels, which overrides `width` and `height`, or `auto`."""
    response_format: Literal["url", "b64_json"] | None = None
    """`url` by default."""
    stream: Annotated[bool, AfterValidator(_not_streamed), WithJsonSchema({"const": False})] | None = None
    """Not supported: true is refused."""

    def inference_request(self) -> InferenceRequest:
        """Return the same request as a body of `POST /v1/inference`."""
        common = {name: getattr(self, name) for name in RequestFields.model_fields}
        prompts = [self._prompt(index) for index in range(self.n or 1)]
        return InferenceRequest.model_validate({**(self.model_extra or {}), **common, "prompts": prompts})

    def _prompt(self, index: int) -> PromptItem:
        fields = {name: getattr(self, name) for name in PromptItem.model_fields}
        if self.size is not None:
            fields["width"], fields["height"] = self.size
        if self.seed is not None and self.seed >= 0:
            fields["seed"] = (self.seed + index) % 2**64
        return PromptItem(**{**fields, **self._controls()})

    def _controls(self) -> dict[str, str | None]:
        """Return the prompt fields that differ from those sent."""
        return {}


class ImageEdit(ImageGeneration):
    """Body of `POST /v1/images/edits`, read from a multipart form. `image` holds base64 or URLs."""

    model_config = ConfigDict(json_schema_extra={"examples": []})

    model: Annotated[
        Text, Field(json_schema_extra={"enum": [row.id for row in _MODELS if row.control_images.most]})
    ]
    """An id of `GET /v1/models` that makes pictures and takes control images."""
    image: Annotated[list[str], Field(min_length=1, max_length=len(NUMBERED))]
    """The images to edit, in this order."""
    mask: None = None
    """Not supported: refused."""

    def _controls(self) -> dict[str, str | None]:
        # Previews of every model read a single image from `ctrl_img`.
        fields = NUMBERED if len(self.image) > 1 else ["ctrl_img"]
        return dict.fromkeys(("ctrl_img", *NUMBERED)) | dict(zip(fields, self.image, strict=False))


class ImageAnswer(BaseModel):
    """One picture, as `url` or `b64_json`, depending on `response_format`."""

    url: str | None = None
    b64_json: str | None = None
    seed: int


class ImagesAnswer(BaseModel):
    """Response of OpenAI's image routes. `created` is in seconds since 1970, `size` is that of the pictures.

    `GET /v1/requests/{id}/result` has more about the pictures; its id is `request_id`.
    """

    created: int
    data: list[ImageAnswer]
    output_format: ImageFormat
    size: str
    request_id: str
    warnings: list[str]
