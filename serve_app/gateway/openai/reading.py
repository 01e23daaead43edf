"""Reads the bodies of OpenAI's clients: JSON, and forms with files and nested fields in brackets.

FastAPI does not read them, because it keeps a body in memory until the response: these routes wait for a job.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from functools import partial
from json import JSONDecodeError
from typing import Any

from fastapi import Request
from fastapi.datastructures import FormData
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from serve_app.gateway.openai.bodies import ImageEdit, ImageGeneration
from serve_app.gateway.shared import Parts
from serve_app.wire.refusals import Refusal

MAX_FILES = 16
"""OpenAI's limit."""

MAX_FIELDS = 100

_NAME = re.compile(r"(\w+)(\[\])?(?:\[(\w+)\])?(\[\])?")
"""Matches `seed`, `image[]`, `loras[][path]`, `webhook[url]`, `webhook[events][]`."""

_NESTED = ("loras", "webhook")
"""Fields with nested values. They may also be sent as JSON."""


async def read_generation(request: Request) -> ImageGeneration:
    """Return the JSON body of a generation. Raises `Refusal`, or `RequestValidationError` like FastAPI."""
    # Without this check, forms on other sites could submit requests (CSRF): they have other types.
    if "json" not in request.headers.get("Content-Type", ""):
        raise _invalid("Content-Type must be application/json")
    try:
        return ImageGeneration.model_validate(await request.json())
    except JSONDecodeError as error:
        raise _invalid(str(error)) from None
    except ValidationError as error:
        raise _wrong(error) from None


async def read_edit(request: Request, parts: Parts) -> ImageEdit:
    """Return the form body of an edit. Raises as `read_generation` does."""
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            return await parts.run(partial(_read, form), parts.pictures)
    except Refusal:
        raise
    except HTTPException as error:
        raise _invalid(error.detail) from None
    except ValidationError as error:
        raise _wrong(error) from None


def described(model: type[ImageGeneration], media_type: str) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads its body itself, with references to nested schemas."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs")
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def described_form(model: type[ImageEdit]) -> dict[str, Any]:
    """Do the same for a form, which has files but no null."""
    extra = described(model, "multipart/form-data")
    schema = extra["requestBody"]["content"]["multipart/form-data"]["schema"]
    schema["properties"]["image"]["items"]["contentMediaType"] = "application/octet-stream"
    for field in schema["properties"].values():
        for choice in field.pop("anyOf", ()):
            field |= {} if choice == {"type": "null"} else choice
        if field.get("default", ...) is None:
            del field["default"]
    del schema["properties"]["mask"]
    return extra


def _read(form: FormData) -> ImageEdit:
    fields: dict[str, Any] = {}
    for key in form:
        name = _NAME.fullmatch(key)
        if name is not None:
            _put(fields, name, form.getlist(key))
        else:
            fields[key] = None  # Unknown, and listed in `warnings`.
    return ImageEdit.model_validate(fields)


def _put(fields: dict[str, Any], name: re.Match[str], sent: Sequence[str | UploadFile]) -> None:
    """Store the values of one key at the place that its brackets name. List items arrive field by field."""
    field, listed, inner, inner_listed = name.groups()
    values = [_text(value) for value in sent]
    if inner is None:
        fields[field] = _value(field, values)
    elif listed:
        items = fields.setdefault(field, [{} for _ in values])
        if not isinstance(items, list) or [type(item) for item in items] != [dict] * len(values):
            raise _invalid(f"{field}: send JSON if not every item has the same fields")
        for item, value in zip(items, values, strict=True):
            item[inner] = value
    else:
        part = fields.setdefault(field, {})
        if not isinstance(part, dict):
            raise _invalid(f"{field}: send this field only once")
        part[inner] = values if inner_listed else values[-1]


def _value(field: str, values: Sequence[str]) -> Any:  # noqa: ANN401 - any JSON
    if field == "image":
        return values
    if field not in _NESTED:
        return values[-1]
    try:
        read = [from_json(value, allow_inf_nan=False) for value in values]
    except ValueError:
        raise _invalid(f"{field}: not JSON") from None
    return read[-1] if field == "webhook" or isinstance(read[-1], list) else read


def _text(value: str | UploadFile) -> str:
    return value if isinstance(value, str) else base64.b64encode(value.file.read()).decode()


def _invalid(message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "form", "loc": ("body",), "msg": message}])


def _wrong(error: ValidationError) -> RequestValidationError:
    return RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()])
