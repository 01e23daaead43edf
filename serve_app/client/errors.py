"""Errors of the client, and which failed exchanges it retries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from cluster.jobs.model import JobState
from serve_app.client.answers import Status


class LoraServeError(Exception):
    """Base of all errors: `code` for programs, `message` for people, `details` depend on the code."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        self.code = code
        self.message = message
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Refused(LoraServeError):
    """The service answered with an error; `status` is the HTTP status.

    `code` is the service's error code, `VALIDATION_ERROR` for a 422 (`details["errors"]` lists the errors),
    or else `HTTP_` and the status.
    """

    def __init__(
        self, status: int, code: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(code, message, details)
        self.status = status


class Unreachable(LoraServeError):
    """No answer came. `UNREACHABLE`: nothing was sent. `CONNECTION_LOST`: the server may have acted."""


class JobFailed(LoraServeError):
    """The job did not succeed.

    `code` is `CANCELED`, the job's `error_code`, or `JOB_FAILED` if it has no error code.
    """

    def __init__(self, status: Status) -> None:
        canceled = status.status is JobState.CANCELED
        code = "CANCELED" if canceled else status.error_code or "JOB_FAILED"
        message = status.error or ("The job was canceled." if canceled else "The job failed.")
        super().__init__(code, message, {"request_id": status.request_id, "status": status.status.value})


class WaitTimeout(LoraServeError):
    """The job has not ended within the timeout. It continues; `details` is its last status."""


class DownloadFailed(LoraServeError):
    """The file has another hash than the result says (`SHA256_MISMATCH`), or there is no URL (`NO_URL`)."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed exchange: the `error` to raise, and whether to retry first.

    `retryable`: another attempt may succeed, after `retry_after_s` seconds at the earliest. `may_have_acted`:
    the server may have acted on the request, so repeat it only if that is safe.
    """

    error: LoraServeError
    retryable: bool = False
    may_have_acted: bool = False
    retry_after_s: float = 0.0


def lost(error: httpx.RequestError, host: str) -> Failure:
    """Classify an exchange that ended without an answer; `host` is for the message."""
    cause = f"{type(error).__name__} {error}".strip()
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    if unsent:
        return Failure(Unreachable("UNREACHABLE", f"{host} cannot be reached ({cause})."), retryable=True)
    ours = isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol)
    retryable = isinstance(error, httpx.TransportError) and not ours
    message = f"The connection to {host} was lost before the complete answer arrived ({cause})."
    return Failure(Unreachable("CONNECTION_LOST", message), retryable=retryable, may_have_acted=True)


def refused(response: httpx.Response) -> Failure:
    """Classify an error answer or an unexpected redirect; its body must have been read."""
    status = response.status_code
    own = _own_error(response)
    error = own or Refused(
        status, f"HTTP_{status}", f"The server answered {status} {response.reason_phrase}."
    )
    if status in (429, 503):
        # An interrupted commit also answers 503, and may have been stored.
        retry_after_s = _retry_after_s(response)
        return Failure(error, retryable=True, may_have_acted=status == 503, retry_after_s=retry_after_s)
    # A 5xx without the service's own error comes from a proxy that has lost the gateway.
    from_proxy = status >= 500 and own is None
    return Failure(error, retryable=from_proxy, may_have_acted=from_proxy)


def _own_error(response: httpx.Response) -> Refused | None:
    """Return the error if the body has one of the service's two forms, else None."""
    try:
        detail = response.json()["detail"]
        if isinstance(detail, list):
            message = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in detail)
            return Refused(response.status_code, "VALIDATION_ERROR", message, {"errors": detail})
        error = detail["error"]
        return Refused(response.status_code, error["code"], error["message"], error["details"])
    except (ValueError, KeyError, TypeError):
        return None


def _retry_after_s(response: httpx.Response) -> float:
    """Return `Retry-After` in seconds; its value is a number or a date. 0 if it is missing or invalid."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0
