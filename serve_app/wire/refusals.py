"""Refused requests: one table of stable codes with HTTP status and sentence, and what goes over the wire."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from cluster.failures import StoreUnavailable
from cluster.objects.store import StoreError

logger = logging.getLogger(__name__)


class Code(Enum):
    """Stable codes with HTTP status and sentence, those of submitted requests in the order of the checks."""

    API_KEY_REQUIRED = 401, "This service needs `Authorization: Bearer KEY` with one of its keys."
    IDEMPOTENCY_KEY_INVALID = 400, "Idempotency-Key must be 1 to 255 printable ASCII characters."
    IDEMPOTENCY_KEY_REUSED = 409, "This Idempotency-Key was used with another body."
    TOO_MANY_QUEUED = 429, "Too many requests are waiting; try again when some of them have run."
    WEBHOOK_SECRET_REQUIRED = (
        400,
        "This service sends no webhooks: it has no WEBHOOK_SECRET to sign them with.",
    )
    MODEL_NOT_FOUND = 400, "There is no such model; details.supported_models lists the ids."
    LORA_FILE_REQUIRED = 400, "A request needs a LoRA: `loras` must not be empty."
    MOE_FORMAT_REQUIRED = (
        400,
        'This model has two transformers: each LoRA needs `transformer`, "low" or "high".',
    )
    SINGLE_MOE_CONFIG_ONLY = 400, "This model takes one LoRA per request for each of its two transformers."
    MOE_FORMAT_NOT_SUPPORTED = 400, "This model has one transformer: leave `transformer` out of `loras`."
    SINGLE_LORA_ONLY = 400, "This model takes exactly one LoRA per request."
    TOO_MANY_LORAS = (
        400,
        "The request has more LoRAs than the model's `max_loras` in /v1/models.",
    )
    URL_NOT_ALLOWED = 400, "This service does not fetch from that URL; details.reason says why."
    LORA_URL_IS_DIRECTORY = 400, "The LoRA's URL names a folder, not a .safetensors file."
    LORA_PATH_NOT_ALLOWED = 400, "A LoRA path must stay inside the LoRA root."
    LORA_NOT_FOUND = 400, "There is no such LoRA file below the LoRA root."
    LORA_FORMAT_NOT_SUPPORTED = 400, "The LoRA is not an intact .safetensors file of a supported kind."
    LORA_URL_IS_HTML = 400, "The LoRA's URL leads to a web page, not to a file."
    LORA_ACCESS_DENIED = 400, "The LoRA's source wants an account or token that may read it."
    LORA_UNREACHABLE = 502, "The LoRA's source cannot be reached, or sends no usable answer."
    CONTROL_IMAGE_REQUIRED = 400, "This model edits a picture: each prompt needs a control image."
    TOO_MANY_PROMPTS = 400, "The request has more prompts than this service takes at once."
    PROMPT_TOO_LONG = 400, "A prompt, negative prompt or trigger word is too long."
    NUM_FRAMES_NOT_SUPPORTED = 400, "This model makes no video of so few frames."
    FPS_NOT_SUPPORTED = 400, "This model makes videos of one number of frames a second only."
    RESOLUTION_NOT_SUPPORTED = 400, 'This model has only the resolution "Default".'
    OUTPUT_FORMAT_NOT_SUPPORTED = 400, "This model has no such output; details.supported lists its formats."
    TOO_MANY_CONTROL_IMAGES = 400, "A prompt has more control images than the model takes."
    PROMPT_FLAG_INVALID = 400, "A flag in a prompt has no valid value; details.reason says which."
    SECRET_KEY_REQUIRED = 400, "Without SECRET_KEY, an hf_token or the query of a URL would be kept in clear."
    CONTROL_IMAGE_TOO_LARGE = 400, "A control image has more pixels than this service takes."
    CONTROL_IMAGE_INVALID = 400, "A control image is not base64 of an intact picture."
    CONTROL_IMAGE_SHAPE = 400, "A control image is too small or too narrow for the model."
    BATCH_REFUSED = (
        400,
        "Requests of the batch are refused, and nothing was stored; details.errors says which.",
    )

    BODY_TOO_LARGE = 413, "The body is larger than this service takes."
    BATCH_TOO_LARGE = 413, "More requests than may ever wait here; send fewer at a time."
    CURSOR_INVALID = 400, "`cursor` is not the `next_cursor` of an earlier page."
    EVENT_ID_INVALID = 400, "Last-Event-ID is not the id of an event of this service."
    REQUEST_NOT_FOUND = 404, "There is no request with this id."
    BATCH_NOT_FOUND = 404, "There is no batch with this id."
    OUTPUT_NOT_FOUND = 404, "There is no such output."
    JOB_ALREADY_FINISHED = 409, "The request has finished; there is nothing left to cancel."
    IMAGE_MODEL_REQUIRED = 400, "OpenAI's routes make pictures, and this model makes videos."
    FIELD_INVALID = 422, "A field is missing or has no valid value; details.errors says which."
    REQUEST_CANCELED = 409, "The request was canceled before it had made its pictures."
    WAIT_OVER = 504, "The end of the request was not seen in time. It is stored: ask for its result."
    STORE_UNAVAILABLE = 503, "The service cannot reach its store now. Try again."
    INTERNAL_ERROR = 500, "The service failed on this request; its log says why."

    @property
    def status(self) -> int:
        """HTTP status of the answer."""
        return self.value[0]

    @property
    def message(self) -> str:
        """One sentence for people."""
        return self.value[1]


_INSPECTED = (Code.LORA_URL_IS_HTML, Code.LORA_ACCESS_DENIED, Code.LORA_UNREACHABLE)

_CODES = list(Code)

SUBMISSION = (
    *(code for code in _CODES[1 : _CODES.index(Code.CONTROL_IMAGE_SHAPE) + 1] if code not in _INSPECTED),
    Code.BODY_TOO_LARGE,
    Code.STORE_UNAVAILABLE,
)
"""What a request to render may be refused with, beside a missing key: the codes as they stand above."""

INSPECTION = (
    Code.URL_NOT_ALLOWED,
    Code.LORA_URL_IS_DIRECTORY,
    Code.LORA_PATH_NOT_ALLOWED,
    Code.LORA_NOT_FOUND,
    Code.LORA_FORMAT_NOT_SUPPORTED,
    *_INSPECTED,
    Code.BODY_TOO_LARGE,
)
"""What a LoRA to inspect may be refused with."""


class Error(BaseModel):
    """What went wrong: `code` for programs, `message` for people, `details` by code."""

    code: str
    message: str
    details: dict[str, Any]


class ErrorDetail(BaseModel):
    """The wrapper that the reference server puts around an error."""

    error: Error


class ErrorAnswer(BaseModel):
    """Body of every 4xx and 5xx but 422, which is FastAPI's list."""

    detail: ErrorDetail


_HEADERS = {
    Code.API_KEY_REQUIRED: {"WWW-Authenticate": "Bearer"},
    Code.TOO_MANY_QUEUED: {"Retry-After": "10"},
    Code.STORE_UNAVAILABLE: {"Retry-After": "1"},
    # Otherwise the server would read the rest of the body to its end, which may never come.
    Code.BODY_TOO_LARGE: {"Connection": "close"},
}


class Refusal(HTTPException):
    """The request is refused with `code`; details must be JSON and hold nothing secret."""

    def __init__(self, code: Code, **details: Any) -> None:  # noqa: ANN401 - any JSON
        self.code = code.name
        self.message = code.message
        self.details = details
        error = Error(code=self.code, message=self.message, details=details)
        super().__init__(
            code.status,
            detail=ErrorDetail(error=error).model_dump(),
            headers=_HEADERS.get(code),
        )


Responses: TypeAlias = dict[int | str, dict[str, Any]]
"""What FastAPI takes as `responses` of a route."""


def documented(*codes: Code) -> Responses:
    """Describe the refusals of a route."""
    refusals = [(code.status, Error(code=code.name, message=code.message, details={})) for code in codes]
    return described(ErrorAnswer, ("detail", "error"), refusals)


def described(
    model: type[BaseModel], path: Sequence[str], errors: Iterable[tuple[int, BaseModel]]
) -> Responses:
    """Describe errors by status, in bodies of `model` that have them at `path`: their codes, and examples."""
    schema_path = [key for name in (*path, "code") for key in ("properties", name)]
    by_status: dict[int, dict[str, Any]] = {}
    for status, error in errors:
        shown = error.model_dump()
        by_status.setdefault(status, {})[shown["code"]] = {"value": _below(path, shown)}
    return {
        status: {
            "model": model,
            "description": HTTPStatus(status).phrase,
            "content": {
                "application/json": {
                    "schema": _below(schema_path, {"enum": list(examples)}),
                    "examples": examples,
                }
            },
        }
        for status, examples in by_status.items()
    }


def _below(path: Sequence[str], leaf: Any) -> Any:  # noqa: ANN401 - any JSON
    """Return `leaf` in nested objects, one for each name of `path`."""
    return {path[0]: _below(path[1:], leaf)} if path else leaf


def install_handlers(app: FastAPI) -> None:
    """Make every error of `app` leave in the forms of this module."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StoreUnavailable, _store_unavailable)
    app.add_exception_handler(StoreError, _store_unavailable)
    app.add_exception_handler(Exception, _internal)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this type
    return JSONResponse({"detail": safe_errors(error.errors())}, status_code=422)


def safe_errors(errors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return pydantic's errors without what may be secret, large or no JSON.

    `input` is echoed only where it is an ordinary number, a boolean or null: a string may be a prompt or a
    token.
    """
    return [
        {
            "type": error["type"],
            "loc": list(error["loc"]),
            "msg": error["msg"],
            **({"input": error["input"]} if _harmless(error) else {}),
            **({"ctx": error["ctx"]} if error.get("ctx") else {}),
        }
        for error in errors
    ]


def _harmless(error: Mapping[str, Any]) -> bool:
    value = error.get("input")
    # The comparison is false for NaN too.
    ordinary = value is None or (isinstance(value, int | float) and -(2**64) <= value <= 2**64)
    return "input" in error and ordinary and "hf_token" not in error["loc"]


def _store_unavailable(_: Request, error: Exception) -> JSONResponse:
    logger.warning("store unavailable: %s", error)
    return _answer(Refusal(Code.STORE_UNAVAILABLE))


def _internal(_: Request, error: Exception) -> JSONResponse:
    # The server logs the traceback: this handler runs outermost and the error goes on to it.
    return _answer(Refusal(Code.INTERNAL_ERROR))


def _answer(refusal: Refusal) -> JSONResponse:
    return JSONResponse({"detail": refusal.detail}, status_code=refusal.status_code, headers=refusal.headers)
