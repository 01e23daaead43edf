"""How a client sends, without sending: generators of steps that a shell carries out, and what is tried again.

An operation yields `Send` and `Pause`; the shell sends or sleeps in its own way, blocking or not, and answers
with what came of it. So what is tried again, and when, is written once for both.
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
"""How long a trouble that may pass is met with further attempts: longer than a gateway takes to come back."""

CONNECT_S = 10.0

READ_S = 60.0
"""Longest silence of the server, beyond what it was asked to wait, in seconds."""

FIRST_PAUSE_S, MOST_PAUSE_S = 0.25, 10.0

LIMITS = httpx.Limits(max_connections=None)
"""Long polls hold a connection each; who wants fewer of them asks for less at a time."""

Request = Mapping[str, Any] | BaseModel
"""A body of `POST /v1/inference`: a mapping, or a `serve_app.wire.requests.InferenceRequest`.

In a mapping a control image may also be a `Path`, or a picture of Pillow.
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; answered with the response read whole, or the `httpx.RequestError` it ended in.

    The body of a 200 goes into `into` instead, from its beginning.
    """

    method: str
    url: httpx.URL
    headers: Mapping[str, str] = field(repr=False)
    content: bytes | None = field(default=None, repr=False)
    read_s: float = READ_S
    into: Saving | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What httpx is told besides method and URL."""
        timeout = httpx.Timeout(CONNECT_S, read=self.read_s, write=self.read_s)
        return {"headers": self.headers, "content": self.content, "timeout": timeout}


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for so many seconds; answered with None."""

    seconds: float


Step = Send | Pause
Reply = httpx.Response | httpx.RequestError | None
Operation = Generator[Step, Reply, T]


class Sender:
    """The address of one service, and the patience with it.

    Raises `ValueError` for an address or key that cannot be one.
    """

    def __init__(self, base_url: str, api_key: str | None, patience_s: float) -> None:
        if not _names_server(base_url):
            raise ValueError("base_url must be http://HOST or https://HOST, with neither user nor query")
        if api_key is not None and not re.fullmatch("[!-~]+", api_key):
            # Told here, since the errors of HTTP libraries would show it.
            raise ValueError("api_key must be printable ASCII without blanks")
        self._base = base_url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._patience_s = patience_s
        # Its own, and from the system: a seed set by the program must not make clients move in step.
        self._random = random.SystemRandom()
        self._keyed: bool | None = None

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
        """Return the JSON of a good answer, after as many attempts as patience and `within_s` allow.

        `key` is the `Idempotency-Key`: without one, a POST is not sent again if the server may have acted on
        it. `wait_s` is how long the server was asked to wait.
        """
        headers = dict(self._headers)
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = _encode(body)
        if key is not None:
            headers["Idempotency-Key"] = key
        step = Send(method, httpx.URL(self._base + path, params=query), headers, content, READ_S + wait_s)
        response = yield from self._patiently(step, key, min(self._patience_s, within_s))
        try:
            return response.json()
        except ValueError:
            raise not_the_service(path) from None

    def fetch(self, url: str, into: Saving) -> Operation[None]:
        """Write to `into` what is behind a URL, or a path of the service."""
        # Without the key: the URL may be that of another host, and says all that is needed.
        try:
            there = httpx.URL(f"{self._base}/").join(url)
        except httpx.InvalidURL:
            raise not_the_service("url") from None
        yield from self._patiently(Send("GET", there, {}, into=into), None, self._patience_s)

    def _patiently(self, send: Send, key: str | None, patience_s: float) -> Operation[httpx.Response]:
        """Send until it goes well, fails for good, or patience ends."""
        end = time.monotonic() + patience_s
        for pause_s in self._pauses():
            reply = yield send
            if isinstance(reply, httpx.Response):
                if reply.status_code < 300:
                    return reply
                trouble = refused(reply)
            else:
                assert reply is not None  # noqa: S101 - a shell answers `Send` with one of two
                trouble = lost(reply, send.url.netloc.decode())
            if not trouble.passes:
                raise trouble.error
            if trouble.uncertain and send.method == "POST" and not (yield from self._knows(key)):
                raise trouble.error
            pause_s = max(pause_s, trouble.after_s * self._random.uniform(1.0, 1.25))
            if time.monotonic() + pause_s > end:
                raise trouble.error
            logger.info("%s %s in %.1f s again: %s", send.method, send.url.path, pause_s, trouble.error)
            yield Pause(pause_s)
        raise AssertionError("pauses have no end")

    def _knows(self, key: str | None) -> Operation[bool]:
        """Tell whether the server knows such keys: its description says so."""
        if key is None:
            return False
        if self._keyed is None:
            try:
                about = yield from self.send("GET", "/openapi.json")
            except Refused:
                about = None
            self._keyed = '"idempotency-key"' in json.dumps(about).lower()
        return self._keyed

    def _pauses(self) -> Iterator[float]:
        """Yield seconds that double up to a bound, half of each left to chance."""
        pause_s = FIRST_PAUSE_S
        while True:
            yield pause_s * self._random.uniform(0.5, 1.0)
            pause_s = min(2 * pause_s, MOST_PAUSE_S)


def _names_server(base_url: str) -> bool:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        return False
    more = url.userinfo or url.query or url.fragment
    return url.scheme in ("http", "https") and bool(url.host) and not more


def _encode(body: Request) -> bytes:
    """Return a body as JSON; raises `TypeError` or `ValueError` for what JSON cannot hold."""
    plain = body.model_dump(mode="json", exclude_none=True) if isinstance(body, BaseModel) else dict(body)
    return json.dumps(plain, default=picture_text, allow_nan=False).encode()


def not_the_service(what: str) -> LoraServeError:
    """Return the error of an answer that this service does not give."""
    return LoraServeError("ANSWER_INVALID", f"The answer is not that of this service: {what}.")
