"""Refused requests: one table of stable codes with HTTP status and sentence, and what goes over the wire."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, Flag, auto
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from cluster.failures import StoreUnavailable
from cluster.objects.store import StoreError

logger = logging.getLogger(__name__)


class Route(Flag):
    """The kinds of routes whose documentation lists a code."""

    SUBMIT = auto()
    INSPECT = auto()


NO_ROUTE = Route(0)


class Code(Enum):
    """Stable codes with status, sentence and routes; those of `SUBMIT` are in the order of the checks."""

    API_KEY_REQUIRED = 401, "This service needs `Authorization: Bearer KEY` with one of its keys."
    IDEMPOTENCY_KEY_INVALID = (
        400,
        "Idempotency-Key must be 1 to 255 printable ASCII characters.",
        Route.SUBMIT,
    )
    IDEMPOTENCY_KEY_REUSED = 409, "This Idempotency-Key was used with another body.", Route.SUBMIT
    TOO_MANY_QUEUED = (
        429,
        "Too many requests are waiting; try again when some of them have run.",
        Route.SUBMIT,
    )
    WEBHOOK_SECRET_REQUIRED = (
        400,
        "This service sends no webhooks: it has no WEBHOOK_SECRET to sign them with.",
        Route.SUBMIT,
    )
    MODEL_NOT_FOUND = 400, "There is no such model; details.supported_models lists the ids.", Route.SUBMIT
    LORA_FILE_REQUIRED = 400, "A request needs a LoRA: `loras` must not be empty.", Route.SUBMIT
    MOE_FORMAT_REQUIRED = (
        400,
        'This model has two transformers: each LoRA needs `transformer`, "low" or "high".',
        Route.SUBMIT,
    )
    SINGLE_MOE_CONFIG_ONLY = (
        400,
        "This model takes one LoRA per request for each of its two transformers.",
        Route.SUBMIT,
    )
    MOE_FORMAT_NOT_SUPPORTED = (
        400,
        "This model has one transformer: leave `transformer` out of `loras`.",
        Route.SUBMIT,
    )
    SINGLE_LORA_ONLY = 400, "This model takes exactly one LoRA per request.", Route.SUBMIT
    TOO_MANY_LORAS = (
        400,
        "The request has more LoRAs than the model's `max_loras` in /v1/models.",
        Route.SUBMIT,
    )
    URL_NOT_ALLOWED = (
        400,
        "This service does not fetch from that URL; details.reason says why.",
        Route.SUBMIT | Route.INSPECT,
    )
    LORA_URL_IS_DIRECTORY = (
        400,
        "The LoRA's URL names a folder, not a .safetensors file.",
        Route.SUBMIT | Route.INSPECT,
    )
    LORA_PATH_NOT_ALLOWED = 400, "A LoRA path must stay inside the LoRA root.", Route.SUBMIT | Route.INSPECT
    LORA_NOT_FOUND = 400, "There is no such LoRA file below the LoRA root.", Route.SUBMIT | Route.INSPECT
    LORA_FORMAT_NOT_SUPPORTED = (
        400,
        "The LoRA is not an intact .safetensors file of a supported kind.",
        Route.SUBMIT | Route.INSPECT,
    )
    LORA_URL_IS_HTML = 400, "The LoRA's URL leads to a web page, not to a file.", Route.INSPECT
    LORA_ACCESS_DENIED = 400, "The LoRA's source wants an account or token that may read it.", Route.INSPECT
    LORA_UNREACHABLE = 502, "The LoRA's source cannot be reached, or sends no usable answer.", Route.INSPECT
    CONTROL_IMAGE_REQUIRED = (
        400,
        "This model edits a picture: each prompt needs a control image.",
        Route.SUBMIT,
    )
    TOO_MANY_PROMPTS = 400, "The request has more prompts than this service takes at once.", Route.SUBMIT
    PROMPT_TOO_LONG = 400, "A prompt, negative prompt or trigger word is too long.", Route.SUBMIT
    NUM_FRAMES_NOT_SUPPORTED = 400, "This model makes no video of so few frames.", Route.SUBMIT
    FPS_NOT_SUPPORTED = 400, "This model makes videos of one number of frames a second only.", Route.SUBMIT
    RESOLUTION_NOT_SUPPORTED = 400, 'This model has only the resolution "Default".', Route.SUBMIT
    OUTPUT_FORMAT_NOT_SUPPORTED = (
        400,
        "This model has no such output; details.supported lists its formats.",
        Route.SUBMIT,
    )
    TOO_MANY_CONTROL_IMAGES = 400, "A prompt has more control images than the model takes.", Route.SUBMIT
    PROMPT_FLAG_INVALID = (
        400,
        "A flag in a prompt has no valid value; details.reason says which.",
        Route.SUBMIT,
    )
    SECRET_KEY_REQUIRED = (
        400,
        "Without SECRET_KEY, an hf_token or the query of a URL would be kept in clear.",
        Route.SUBMIT,
    )
    CONTROL_IMAGE_TOO_LARGE = 400, "A control image has more pixels than this service takes.", Route.SUBMIT
    CONTROL_IMAGE_INVALID = 400, "A control image is not base64 of an intact picture.", Route.SUBMIT
    CONTROL_IMAGE_SHAPE = 400, "A control image is too small or too narrow for the model.", Route.SUBMIT
    BATCH_REFUSED = (
        400,
        "Requests of the batch are refused, and nothing was stored; details.errors says which.",
    )

    BODY_TOO_LARGE = 413, "The body is larger than this service takes.", Route.SUBMIT | Route.INSPECT
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
    STORE_UNAVAILABLE = 503, "The service cannot reach its store now. Try again.", Route.SUBMIT
    INTERNAL_ERROR = 500, "The service failed on this request; its log says why."

    def __init__(self, status: int, message: str, routes: Route = NO_ROUTE) -> None:
        """Name the HTTP status, one sentence for people, and the routes that document the code."""
        self.status = status
        self.message = message
        self.routes = routes


SUBMISSION = tuple(code for code in Code if Route.SUBMIT in code.routes)
"""What a request to render may be refused with, besides a missing key."""

INSPECTION = tuple(code for code in Code if Route.INSPECT in code.routes)
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
