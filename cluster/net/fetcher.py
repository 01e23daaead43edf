"""The guarded fetcher: HTTP for every URL in a request.

For the URL and for each redirect, it resolves the name once, checks the addresses (`cluster.net.urls`) and
connects only to those. Bytes, time and rate are limited. An incomplete body is an error. Proxies and netrc of
the environment are ignored. All calls block: use worker threads.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import BinaryIO
from urllib.parse import urljoin

import httpcore
import httpx

from cluster.net.limits import LIMITS, FetchError, FetchFault, Limits, Pace, copy, too_large
from cluster.net.pinned_connections import Pinned
from cluster.net.urls import Url, UrlRefused, check_url, is_listed, is_public, parse_url

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_MAX_ETAG_CHARS = 256

_SPAN = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")

Resolve = Callable[[str, int], list[str]]
"""Resolves a host name and port to addresses. Raises `OSError`."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was written: the sha256 in hex, the size, and the server's ETag."""

    sha256: str
    bytes: int
    etag: str | None


def resolve_name(host: str, port: int) -> list[str]:
    """Return the addresses of a host, from the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Fetcher:
    """Fetches URLs of requests. `hosts` is the operator's allow list (`parse_hosts`)."""

    def __init__(
        self, hosts: frozenset[str] = frozenset(), limits: Limits = LIMITS, resolve: Resolve = resolve_name
    ) -> None:
        self.hosts = hosts
        self._limits = limits
        self._resolve = resolve
        self._tls = httpx.create_ssl_context()

    def pace(self, tick: Callable[[], None]) -> Pace:
        """Start the time and rate limits of a fetch that does not use HTTP, such as one from S3."""
        return Pace(self._limits, tick)

    def fetch(
        self,
        url: Url,
        into: BinaryIO,
        *,
        max_bytes: int,
        etag: str | None = None,
        token: str | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Fetched | None:
        """Write the body of `url` to `into`, or return None if it is still the version named by `etag`.

        `token` is sent as bearer token, only to the origin of `url`. Raises `FetchError`, `OSError` if `into`
        cannot be written, and anything that `tick` raises.
        """
        headers = {"If-None-Match": etag} if etag else {}
        with self._answer("GET", url, headers, token, self.pace(tick), across=True) as answer:
            if answer.status == 304 and etag:
                return None
            answer.check(max_bytes)
            sha256, size = copy(answer.pieces(), into, max_bytes)
            return Fetched(sha256, size, answer.etag)

    def head(
        self, url: Url, *, token: str | None = None, tick: Callable[[], None] = lambda: None
    ) -> Mapping[str, str]:
        """Return the headers of `url`, with lower-case names. Follows relative redirects only.

        Raises the errors of `fetch`.
        """
        with self._answer("HEAD", url, {}, token, self.pace(tick), across=False) as answer:
            if answer.status not in _REDIRECTS:
                answer.check(None)
            return answer.headers

    def read(self, url: Url, start: int, stop: int, *, token: str | None = None) -> tuple[bytes, int | None]:
        """Return bytes `start` to `stop` (exclusive) of the body of `url`, and its total size if known.

        There are fewer bytes if the body ends earlier. If the server ignores the range, reading stops at
        `stop`. `token` and errors are as for `fetch`.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        with self._answer("GET", url, headers, token, self.pace(lambda: None), across=True) as answer:
            if answer.status == 416:
                return b"", None
            first, size = answer.begin()
            if not first <= start:
                raise FetchError(
                    FetchFault.UNUSABLE, f"{url.host} sent another part of the file than requested."
                )
            data = bytearray()
            for piece in answer.pieces():
                data += piece
                if len(data) >= stop - first:
                    break
            return bytes(data[start - first : stop - first]), size

    def post(self, url: Url, body: bytes, headers: Mapping[str, str]) -> int:
        """Post `body`, which is JSON, to `url` and return the response's status. Follows no redirects.

        Raises the errors of `fetch`.
        """
        sent = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        with self._request("POST", url, sent, self.pace(lambda: None), body) as answer:
            return answer.status

    @contextmanager
    def _answer(
        self, method: str, url: Url, headers: Mapping[str, str], token: str | None, pace: Pace, across: bool
    ) -> Iterator[_Answer]:
        """Follow redirects and yield the first other answer. Without `across`, follow relative ones only."""
        origin = url
        for _ in range(self._limits.redirects + 1):
            own = (url.scheme, url.netloc) == (origin.scheme, origin.netloc)
            bearer = {"Authorization": f"Bearer {token}"} if token and own else {}
            with self._request(method, url, {**headers, **bearer}, pace) as answer:
                following = _redirection(url, answer)
                if following is None or not (across or answer.headers["location"].startswith("/")):
                    yield answer
                    return
            url = following
        raise FetchError(FetchFault.UNUSABLE, f"{origin.host} redirects too often.")

    @contextmanager
    def _request(
        self, method: str, url: Url, headers: Mapping[str, str], pace: Pace, body: bytes | None = None
    ) -> Iterator[_Answer]:
        backend = Pinned(self._addresses(url), pace)
        target = httpcore.URL(scheme=url.scheme, host=url.host.strip("[]"), port=url.port, target=url.target)
        sent = {"Host": url.netloc, "Accept-Encoding": "identity", "User-Agent": "lora-serve", **headers}
        try:
            with (
                httpcore.ConnectionPool(self._tls, network_backend=backend) as pool,
                pool.stream(method, target, headers=list(sent.items()), content=body) as response,
            ):
                yield _Answer(url, response)
        except httpcore.TimeoutException as error:
            raise FetchError(FetchFault.UNREACHABLE, f"{url.host} did not answer in time.") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise FetchError(FetchFault.UNREACHABLE, f"The connection to {url.host} failed.") from error

    def _addresses(self, url: Url) -> list[str]:
        """Resolve the host of `url`. Every address must be public, unless the host is on the allow list."""
        try:
            check_url(url, self.hosts)
        except UrlRefused as error:
            raise FetchError(FetchFault.NOT_ALLOWED, str(error)) from error
        try:
            found = [str(url.address)] if url.address else self._resolve(url.host, url.port)
        except OSError as error:
            raise FetchError(FetchFault.UNREACHABLE, f"The host name {url.host} does not resolve.") from error
        if not is_listed(url, self.hosts) and not all(is_public(ip_address(address)) for address in found):
            raise FetchError(FetchFault.NOT_ALLOWED, f"{url.host} is not on the public internet.")
        return found


class _Answer:
    """A response: status, headers, and the body, which is read on demand."""

    def __init__(self, url: Url, response: httpcore.Response) -> None:
        self._host = url.host
        self._response = response
        self.status = response.status
        self.headers = {
            name.decode("latin-1").lower(): text.decode("latin-1") for name, text in response.headers
        }

    @property
    def etag(self) -> str | None:
        """The ETag, None if it is not safe to send back."""
        etag = self.headers.get("etag", "")
        return etag if 0 < len(etag) <= _MAX_ETAG_CHARS and etag.isascii() and etag.isprintable() else None

    def check(self, max_bytes: int | None) -> None:
        """Raise `FetchError` unless this is a 200 with an unencoded body, not announced as too large."""
        if self.status != 200:
            raise FetchError(fault_of(self.status), f"{self._host} answered {self.status}.")
        self._check_encoding()
        if max_bytes is not None and int(self.headers.get("content-length", 0)) > max_bytes:
            raise too_large(max_bytes)

    def begin(self) -> tuple[int, int | None]:
        """Return the offset of this answer's bytes in the whole body, and the total size if known.

        Raises `FetchError` as `check` does.
        """
        span = _SPAN.fullmatch(self.headers.get("content-range", ""))
        if self.status != 206 or span is None:
            self.check(None)
            length = self.headers.get("content-length")
            return 0, int(length) if length else None
        self._check_encoding()
        return int(span[1]), int(span[2]) if span[2] != "*" else None

    def pieces(self) -> Iterator[bytes]:
        """Yield the body. Raises an error of httpcore if it is shorter than announced."""
        return iter(self._response.iter_stream())

    def _check_encoding(self) -> None:
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise FetchError(
                FetchFault.UNUSABLE, f"{self._host} sent the file compressed, which is not supported."
            )


def _redirection(url: Url, answer: _Answer) -> Url | None:
    if answer.status not in _REDIRECTS or "location" not in answer.headers:
        return None
    try:
        following = parse_url(urljoin(url.full, answer.headers["location"]))
    except ValueError as error:
        raise FetchError(
            FetchFault.NOT_ALLOWED, f"{url.host} redirects to a URL that is not usable."
        ) from error
    if (url.scheme, following.scheme) == ("https", "http"):
        raise FetchError(
            FetchFault.NOT_ALLOWED, f"{url.host} redirects from https to http, which is not allowed."
        )
    return following


def fault_of(status: int) -> FetchFault:
    """Return the fault that an HTTP status other than success stands for."""
    if status in (404, 410):
        return FetchFault.NOT_FOUND
    if status in (401, 402, 403, 407, 451):
        return FetchFault.DENIED
    again = status in (408, 425, 429) or status >= 500
    return FetchFault.UNREACHABLE if again else FetchFault.UNUSABLE
