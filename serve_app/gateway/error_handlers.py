"""From exceptions to error bodies: of refusals, invalid fields, an unreachable store, and faults of ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from cluster.failures import StoreUnavailable
from cluster.objects.store import StoreError
from serve_app.wire.refusals import Code, Refusal

logger = logging.getLogger(__name__)


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every error with the bodies of `wire.refusals`."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StoreUnavailable, _store_unavailable)
    app.add_exception_handler(StoreError, _store_unavailable)
    app.add_exception_handler(Exception, _internal)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this type
    return JSONResponse({"detail": safe_errors(error.errors())}, status_code=422)


def safe_errors(errors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return pydantic's errors without values that may be secret, large or not JSON.

    `input` is echoed only if it is an ordinary number, a boolean or null: a string may be a prompt or
    a token.
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
    # This is also false for NaN.
    ordinary = value is None or (isinstance(value, int | float) and -(2**64) <= value <= 2**64)
    return "input" in error and ordinary and "hf_token" not in error["loc"]


def _store_unavailable(_: Request, error: Exception) -> JSONResponse:
    logger.warning("store unavailable: %s", error)
    return _answer(Refusal(Code.STORE_UNAVAILABLE))


def _internal(_: Request, error: Exception) -> JSONResponse:
    # Not logged here: Starlette raises the error again after this handler, and the server logs the traceback.
    return _answer(Refusal(Code.INTERNAL_ERROR))


def _answer(refusal: Refusal) -> JSONResponse:
    return JSONResponse({"detail": refusal.detail}, status_code=refusal.status_code, headers=refusal.headers)
