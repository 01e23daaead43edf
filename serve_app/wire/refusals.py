"""Refusals: one table of stable codes with HTTP status and sentence, and the error bodies."""

from __future__ import annotations

from enum import Enum, Flag, auto
from typing import Any

from fastapi import HTTPException
from pydantic import BaseModel


class Route(Flag):
    """The kinds of routes that list a code in their documentation."""

    SUBMIT = auto()
    INSPECT = auto()


NO_ROUTE = Route(0)


class Code(Enum):
    """Stable codes with status, sentence and routes. The codes of `SUBMIT` are in the order of the checks."""

    API_KEY_REQUIRED = (
        401,
        "This service needs an API key: send `Authorization: Bearer KEY` with one of its keys.",
    )
    IDEMPOTENCY_KEY_INVALID = (
        400,
        "Idempotency-Key must be 1 to 255 printable ASCII characters.",
        Route.SUBMIT,
    )
    IDEMPOTENCY_KEY_REUSED = (
        409,
        "This Idempotency-Key was used with another body. Use a new key.",
        Route.SUBMIT,
    )
    TOO_MANY_QUEUED = (
        429,
        "Too many requests are queued. Retry after the time in `Retry-After`.",
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
        "This model has two transformers and takes one LoRA per request for each.",
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
        "The request has more LoRAs than the model's `max_loras` in /v1/models allows.",
        Route.SUBMIT,
    )
    URL_NOT_ALLOWED = (
        400,
        "This service does not fetch from that URL; details.reason says why.",
        Route.SUBMIT | Route.INSPECT,
    )
    LORA_URL_IS_DIRECTORY = (
        400,
        "The LoRA's URL is a folder. Link to a .safetensors file.",
        Route.SUBMIT | Route.INSPECT,
    )
    LORA_PATH_NOT_ALLOWED = 400, "A LoRA path must stay inside the LoRA root.", Route.SUBMIT | Route.INSPECT
    LORA_NOT_FOUND = 400, "There is no such LoRA file below the LoRA root.", Route.SUBMIT | Route.INSPECT
    LORA_FORMAT_NOT_SUPPORTED = (
        400,
        "The LoRA is damaged, or not a supported .safetensors file; details.reason says why.",
        Route.SUBMIT | Route.INSPECT,
    )
    LORA_URL_IS_HTML = 400, "The LoRA's URL returns a web page, not a file.", Route.INSPECT
    LORA_ACCESS_DENIED = (
        400,
        "The LoRA's source requires an account or token with read access.",
        Route.INSPECT,
    )
    LORA_UNREACHABLE = 502, "The LoRA's source is unreachable or sent no usable response.", Route.INSPECT
    CONTROL_IMAGE_REQUIRED = (
        400,
        "This model needs a control image for each prompt.",
        Route.SUBMIT,
    )
    TOO_MANY_PROMPTS = (
        400,
        "The request has more prompts than this service allows; details.most is the limit.",
        Route.SUBMIT,
    )
    PROMPT_TOO_LONG = (
        400,
        "A prompt, negative prompt or trigger word is too long; details.most is the limit in characters.",
        Route.SUBMIT,
    )
    NUM_FRAMES_NOT_SUPPORTED = (
        400,
        "This model cannot make a video with so few frames; details.least is the minimum.",
        Route.SUBMIT,
    )
    FPS_NOT_SUPPORTED = (
        400,
        "This model makes videos at one frame rate only; details.supported is that rate.",
        Route.SUBMIT,
    )
    RESOLUTION_NOT_SUPPORTED = (
        400,
        'This model, or its preview, supports only the resolution "Default".',
        Route.SUBMIT,
    )
    OUTPUT_FORMAT_NOT_SUPPORTED = (
        400,
        "This model cannot write that output format; details.supported lists its formats.",
        Route.SUBMIT,
    )
    TOO_MANY_CONTROL_IMAGES = (
        400,
        "A prompt has more control images than the model takes; details.most is the limit.",
        Route.SUBMIT,
    )
    PROMPT_FLAG_INVALID = (
        400,
        "A flag in a prompt has an invalid value; details.reason says which.",
        Route.SUBMIT,
    )
    SECRET_KEY_REQUIRED = (
        400,
        "This service has no SECRET_KEY to encrypt an hf_token or the query of a URL. Send neither.",
        Route.SUBMIT,
    )
    CONTROL_IMAGE_TOO_LARGE = (
        400,
        "A control image has more pixels than this service accepts; details.max_pixels is the limit.",
        Route.SUBMIT,
    )
    CONTROL_IMAGE_INVALID = (
        400,
        "A control image is not a valid picture in base64; details.reason says why.",
        Route.SUBMIT,
    )
    CONTROL_IMAGE_SHAPE = 400, "A control image is too small or too narrow for the model.", Route.SUBMIT
    BATCH_REFUSED = (
        400,
        "Nothing was stored, because some requests of the batch were refused; details.errors says which.",
    )

    BODY_TOO_LARGE = (
        413,
        "The body has more bytes or JSON values than this service accepts.",
        Route.SUBMIT | Route.INSPECT,
    )
    BATCH_TOO_LARGE = 413, "The batch has more requests than this service ever queues. Send fewer at a time."
    CURSOR_INVALID = 400, "`cursor` is not the `next_cursor` of a page."
    EVENT_ID_INVALID = 400, "Last-Event-ID is not an event id of this service."
    REQUEST_NOT_FOUND = 404, "There is no request with this id."
    BATCH_NOT_FOUND = 404, "There is no batch with this id."
    OUTPUT_NOT_FOUND = 404, "There is no such output."
    JOB_ALREADY_FINISHED = 409, "The request has finished; there is nothing left to cancel."
    IMAGE_MODEL_REQUIRED = (
        400,
        "This model makes videos, and OpenAI's routes only make pictures. Use /v1/inference.",
    )
    FIELD_INVALID = 422, "A field is missing or invalid; details.errors says which."
    REQUEST_CANCELED = 409, "The request was canceled before its pictures were made."
    WAIT_OVER = 504, "The result could not be returned in time. The request is stored: read its result later."
    STORE_UNAVAILABLE = (
        503,
        "The service cannot reach its job table or output store. Retry after the time in `Retry-After`.",
        Route.SUBMIT,
    )
    INTERNAL_ERROR = 500, "The service failed on this request; its log says why."

    def __init__(self, status: int, message: str, routes: Route = NO_ROUTE) -> None:
        """Set the HTTP status, a message for people, and the routes that document the code."""
        self.status = status
        self.message = message
        self.routes = routes


SUBMISSION = tuple(code for code in Code if Route.SUBMIT in code.routes)
"""Codes that refuse a request to render, besides a missing key."""

INSPECTION = tuple(code for code in Code if Route.INSPECT in code.routes)
"""Codes that refuse to inspect a LoRA."""


class Error(BaseModel):
    """What went wrong: `code` for programs, `message` for people. `details` depends on the code."""

    code: str
    message: str
    details: dict[str, Any]


class ErrorDetail(BaseModel):
    """The wrapper that the reference server puts around an error."""

    error: Error


class ErrorAnswer(BaseModel):
    """Body of every 4xx and 5xx response except 422, which has FastAPI's list."""

    detail: ErrorDetail


_HEADERS = {
    Code.API_KEY_REQUIRED: {"WWW-Authenticate": "Bearer"},
    Code.TOO_MANY_QUEUED: {"Retry-After": "10"},
    Code.STORE_UNAVAILABLE: {"Retry-After": "1"},
    # Otherwise the server would read the rest of the body, which may never end.
    Code.BODY_TOO_LARGE: {"Connection": "close"},
}


class Refusal(HTTPException):
    """Refuses the request with `code`. Details must be JSON and contain no secrets."""

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
