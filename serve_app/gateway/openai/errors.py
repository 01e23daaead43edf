"""Errors in OpenAI's form with our codes, and the route class that returns them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from cluster.failures import FailureCode, StoreUnavailable
from cluster.jobs.model import JobState
from cluster.objects.store import StoreError
from serve_app.gateway.auth import KeyedRoute
from serve_app.gateway.error_handlers import safe_errors
from serve_app.wire.answers import StatusAnswer
from serve_app.wire.openapi_errors import Responses, described
from serve_app.wire.refusals import Code, Refusal

logger = logging.getLogger(__name__)

FAULTS = frozenset(
    {
        FailureCode.DEVICE_FAULT,
        FailureCode.INFERENCE_TIMEOUT,
        FailureCode.INTERNAL_ERROR,
        FailureCode.LORA_STORE_ERROR,
        FailureCode.MODEL_LOAD_FAILED,
        FailureCode.OUTPUT_STORE_ERROR,
        FailureCode.OUT_OF_MEMORY,
        FailureCode.SECRET_UNREADABLE,
        FailureCode.WORKER_LOST,
    }
)
"""Failures that are the service's fault: status 500. All others are the request's fault: 400."""


class OpenAIError(BaseModel):
    """What went wrong: `code` is one of our codes, `param` the wrong field; `details` depends on the code."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    code: str
    details: dict[str, Any]

    @classmethod
    def of(
        cls, status: int, code: str, message: str, details: Mapping[str, Any], param: str | None = None
    ) -> OpenAIError:
        """Return the error of a response with this HTTP status."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        return cls(message=message, type=kind, param=param, code=code, details=dict(details))


class OpenAIErrorAnswer(BaseModel):
    """Body of every 4xx and 5xx response of OpenAI's routes."""

    error: OpenAIError


class NoPictures(Exception):
    """A stored request has no pictures to return: it failed, was canceled, or is still running."""

    def __init__(self, request_id: str, status: StatusAnswer | None) -> None:
        """Take the latest status of the request, None if it could not be read."""
        self.request_id = request_id
        if status and status.status is JobState.FAILED:
            self.code, self.message = status.error_code or "", status.error or ""
            self.status = _status(self.code)
        else:
            canceled = status and status.status is JobState.CANCELED
            code = Code.REQUEST_CANCELED if canceled else Code.WAIT_OVER
            self.code, self.message, self.status = code.name, code.message, code.status


class OpenAIRoute(KeyedRoute):
    """A `KeyedRoute` whose errors have OpenAI's form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, wrapped to return errors as responses instead of raising them."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Refusal as refusal:
                return _refused(refusal)
            except RequestValidationError as error:
                return _invalid(error)
            except NoPictures as error:
                return _no_pictures(error)
            except (StoreUnavailable, StoreError) as error:
                logger.warning("store unavailable: %s", error)
                return _refused(Refusal(Code.STORE_UNAVAILABLE))
            except Exception:
                logger.exception("a request failed")
                return _refused(Refusal(Code.INTERNAL_ERROR))

        return handle


def documented(*codes: Code) -> Responses:
    """Return the OpenAPI description of a route's refusals."""
    return described(OpenAIErrorAnswer, ["error"], [(code.status, _example(code)) for code in codes])


def documented_with_failures(*codes: Code) -> Responses:
    """Return the OpenAPI description of a route's refusals and of job failures."""
    refused = {code.name for code in codes}
    failed = [
        (_status(code), OpenAIError.of(_status(code), code, "The `error` in the status of the request.", {}))
        for code in FailureCode
        if code not in refused
    ]
    errors = [*((code.status, _example(code)) for code in codes), *failed]
    return described(OpenAIErrorAnswer, ["error"], errors)


def _status(code: str) -> int:
    return 500 if code in FAULTS else 400


def _example(code: Code) -> OpenAIError:
    return OpenAIError.of(code.status, code.name, code.message, {})


def _refused(refusal: Refusal) -> JSONResponse:
    error = OpenAIError.of(refusal.status_code, refusal.code, refusal.message, refusal.details)
    return _answer(refusal.status_code, error, refusal.headers)


def _invalid(invalid: RequestValidationError) -> JSONResponse:
    code, errors = Code.FIELD_INVALID, safe_errors(invalid.errors())
    param = ".".join(map(str, errors[0]["loc"][1:]))
    message = f"{param}: {errors[0]['msg']}"
    return _answer(code.status, OpenAIError.of(code.status, code.name, message, {"errors": errors}, param))


def _no_pictures(outcome: NoPictures) -> JSONResponse:
    message = f"{outcome.message} (request {outcome.request_id})"
    error = OpenAIError.of(outcome.status, outcome.code, message, {"request_id": outcome.request_id})
    # OpenAI's clients retry after a 409 or 5xx, which would make another job.
    headers = {"X-Request-Id": outcome.request_id, "X-Should-Retry": "false"}
    return _answer(outcome.status, error, headers)


def _answer(status: int, error: OpenAIError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(OpenAIErrorAnswer(error=error).model_dump(), status, headers)
