"""Sending with retries, without I/O: operations are generators of steps that a client carries out.

An operation yields `Send` and `Pause`. The client sends or sleeps, blocking or not, and passes the reply back
into the generator. So both clients share one implementation of the retries.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from serve_app.client.errors import LoraServeError, Refused, lost, refused
from serve_app.client.files import Saving, picture_text

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long transient failures are retried, in seconds; longer than a gateway takes to restart."""

CONNECT_S = 10.0

READ_S = 60.0
"""Read timeout in seconds, in addition to the time that the server is asked to wait."""

FIRST_PAUSE_S, MOST_PAUSE_S = 0.25, 10.0

LIMITS = httpx.Limits(max_connections=None)
"""No limit: each long poll holds a connection. To use fewer, lower the concurrency."""

Request = Mapping[str, Any] | BaseModel
"""A body of `POST /v1/inference`: a mapping, or a `serve_app.wire.requests.InferenceRequest`.

In a mapping a control image may also be a `Path`, or a picture of Pillow.
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request. The reply is the response with its body read, or the `httpx.RequestError`.

    With `into`, the body of a 200 is written there instead, after anything written before is discarded.
    """

    method: str
    url: httpx.URL
    headers: Mapping[str, str] = field(repr=False)
    content: bytes | None = field(default=None, repr=False)
    read_s: float = READ_S
    into: Saving | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for httpx besides method and URL."""
        timeout = httpx.Timeout(CONNECT_S, read=self.read_s, write=self.read_s)
        return {"headers": self.headers, "content": self.content, "timeout": timeout}


@dataclass(frozen=True, slots=True)
class Pause:
    """Sleep for `seconds`. The reply is None."""

    seconds: float


Step = Send | Pause
Reply = httpx.Response | httpx.RequestError | None
Operation = Generator[Step, Reply, T]


class Sender:
    """Sends requests to one service, with retries for `patience_s` seconds.

    Raises `ValueError` for an invalid address or key.
    """

    def __init__(self, base_url: str, api_key: str | None, patience_s: float) -> None:
        if not _is_server_url(base_url):
            raise ValueError("base_url must be http://HOST or https://HOST, without user, query or fragment")
        if api_key is not None and not re.fullmatch("[!-~]+", api_key):
            # Checked here, because an HTTP library would show the key in its error.
            raise ValueError("api_key must be printable ASCII without spaces")
        self._base = base_url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._patience_s = patience_s
        # Not seeded: clients of programs that call `random.seed` must not all retry at the same moment.
        self._random = random.SystemRandom()
        self._supports_keys: bool | None = None

    def send(
        self,
        method: str,
        path: str,
        *,
        body: Request | None = None,
        query: Mapping[str, str] | None = None,
        key: str | None = None,
        wait_s: float = 0.0,
        within_s: float = float("inf"),
    ) -> Operation[Any]:
        """Return the JSON of a successful answer; retry for `within_s`, but at most `patience_s`, seconds.

        `key` is the `Idempotency-Key`. Without it, a POST is not repeated if the server may have acted on it.
        `wait_s` is how many seconds the server is asked to wait; the read timeout grows by it.
        """
        headers = dict(self._headers)
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = _encode(body)
        if key is not None:
            headers["Idempotency-Key"] = key
        step = Send(method, httpx.URL(self._base + path, params=query), headers, content, READ_S + wait_s)
        response = yield from self._send_with_retries(step, key, min(self._patience_s, within_s))
        try:
            return response.json()
        except ValueError:
            raise invalid_answer(path) from None

    def fetch(self, url: str, into: Saving) -> Operation[None]:
        """Download a URL, or a path of the service, into `into`."""
        # Without the key: the URL may lead to another host, and needs no key.
        try:
            target = httpx.URL(f"{self._base}/").join(url)
        except httpx.InvalidURL:
            raise invalid_answer("url") from None
        yield from self._send_with_retries(Send("GET", target, {}, into=into), None, self._patience_s)

    def _send_with_retries(self, send: Send, key: str | None, patience_s: float) -> Operation[httpx.Response]:
        """Send until it succeeds, fails permanently, or `patience_s` seconds are over."""
        end = time.monotonic() + patience_s
        for pause_s in self._pauses():
            reply = yield send
            if isinstance(reply, httpx.Response):
                if reply.status_code < 300:
                    return reply
                failure = refused(reply)
            else:
                assert reply is not None  # noqa: S101 - only a `Pause` has the reply None
                failure = lost(reply, send.url.netloc.decode())
            if not failure.retryable:
                raise failure.error
            repeats_safely = send.method != "POST" or not failure.may_have_acted
            if not repeats_safely and not (yield from self._is_idempotent(key)):
                raise failure.error
            pause_s = max(pause_s, failure.retry_after_s * self._random.uniform(1.0, 1.25))
            if time.monotonic() + pause_s > end:
                raise failure.error
            logger.info("retrying %s %s in %.1f s: %s", send.method, send.url.path, pause_s, failure.error)
            yield Pause(pause_s)
        raise AssertionError("pauses never end")

    def _is_idempotent(self, key: str | None) -> Operation[bool]:
        """Return whether there is a key and the server supports idempotency keys (see its OpenAPI)."""
        if key is None:
            return False
        if self._supports_keys is None:
            try:
                description = yield from self.send("GET", "/openapi.json")
            except Refused:
                description = None
            self._supports_keys = '"idempotency-key"' in json.dumps(description).lower()
        return self._supports_keys

    def _pauses(self) -> Iterator[float]:
        """Yield pauses in seconds: they double up to `MOST_PAUSE_S`, times a random factor of 0.5 to 1."""
        pause_s = FIRST_PAUSE_S
        while True:
            yield pause_s * self._random.uniform(0.5, 1.0)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)


def _is_server_url(base_url: str) -> bool:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        return False
    extras = url.userinfo or url.query or url.fragment
    return url.scheme in ("http", "https") and bool(url.host) and not extras


def _encode(body: Request) -> bytes:
    """Return a body as JSON; raise `TypeError` or `ValueError` for values that JSON does not have."""
    plain = body.model_dump(mode="json", exclude_none=True) if isinstance(body, BaseModel) else dict(body)
    return json.dumps(plain, default=picture_text, allow_nan=False).encode()


def invalid_answer(what: str) -> LoraServeError:
    """Return the error for an answer that this service would not send; `what` names the unexpected part."""
    message = f"The server sent an unexpected answer ({what}). Check that base_url is the inference service."
    return LoraServeError("ANSWER_INVALID", message)
