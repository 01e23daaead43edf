"""What the client raises, and what it makes of a failed exchange: may it pass, did the server act on it."""

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
    """Something went wrong: `code` for programs, `message` for people, `details` by code."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        self.code = code
        self.message = message
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Refused(LoraServeError):
    """The service answered with an error; `status` is that of HTTP.

    `code` is the service's own, `VALIDATION_ERROR` for a 422 (`details["errors"]` is its list), else `HTTP_`
    and the status.
    """

    def __init__(
        self, status: int, code: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(code, message, details)
        self.status = status


class Unreachable(LoraServeError):
    """No answer came: `UNREACHABLE` if nothing was sent, `CONNECTION_LOST` if the server may have acted."""


class JobFailed(LoraServeError):
    """The job did not succeed; `code` is its `error_code`, `CANCELED`, or `JOB_FAILED` where it has none."""

    def __init__(self, status: Status) -> None:
        canceled = status.status is JobState.CANCELED
        code = "CANCELED" if canceled else status.error_code or "JOB_FAILED"
        message = status.error or ("The job was canceled." if canceled else "The job failed.")
        super().__init__(code, message, {"request_id": status.request_id, "status": status.status.value})


class WaitTimeout(LoraServeError):
    """The job has not ended in the time given; it goes on. `details` is its last status."""


class DownloadFailed(LoraServeError):
    """A file is not what the result says (`SHA256_MISMATCH`), or is nowhere to be had (`NO_URL`)."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """A failed exchange: the `error` to raise, and whether to try again first.

    `passes`: another attempt may go well, in `after_s` seconds at the earliest. `uncertain`: the server may
    have acted, so only what may be repeated is sent again.
    """

    error: LoraServeError
    passes: bool = False
    uncertain: bool = False
    after_s: float = 0.0


def lost(error: httpx.RequestError, host: str) -> Trouble:
    """Judge an exchange that ended without an answer; `host` is named to people."""
    told = f"{type(error).__name__} {error}".strip()
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    if unsent:
        return Trouble(Unreachable("UNREACHABLE", f"{host} cannot be reached ({told})."), passes=True)
    ours = isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol)
    passes = isinstance(error, httpx.TransportError) and not ours
    message = f"The connection to {host} was lost before the whole answer came ({told})."
    return Trouble(Unreachable("CONNECTION_LOST", message), passes=passes, uncertain=True)


def refused(response: httpx.Response) -> Trouble:
    """Judge an answer of 400 and above, or a redirect where none belongs; its body must have been read."""
    status = response.status_code
    own = _own_error(response)
    error = own or Refused(
        status, f"HTTP_{status}", f"The server answered {status} {response.reason_phrase}."
    )
    if status in (429, 503):
        # A commit that broke off answers 503, too.
        return Trouble(error, passes=True, uncertain=status == 503, after_s=_retry_after_s(response))
    # A 5xx that is not the service's own is what a proxy says of a gateway that it lost.
    gone = status >= 500 and own is None
    return Trouble(error, passes=gone, uncertain=gone)


def _own_error(response: httpx.Response) -> Refused | None:
    """Return the error in the service's forms; None for another's."""
    try:
        detail = response.json()["detail"]
        if isinstance(detail, list):
            told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in detail)
            return Refused(response.status_code, "VALIDATION_ERROR", told, {"errors": detail})
        error = detail["error"]
        return Refused(response.status_code, error["code"], error["message"], error["details"])
    except (ValueError, KeyError, TypeError):
        return None


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds of `Retry-After`, which names seconds or a time; 0 without a valid one."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0
