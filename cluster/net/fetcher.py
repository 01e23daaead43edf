"""The guarded fetcher: HTTP for everything that a request names.

It resolves a name once, checks the addresses (`cluster.net.urls`), and connects to one of exactly these; it
does so again at each redirect. Bytes, time and rate are bounded. A body is taken whole or not at all. The
environment (proxies, netrc) has no influence. Blocking, for worker threads.
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
from cluster.net.pinned import Pinned
from cluster.net.urls import Url, UrlRefused, check_url, is_listed, is_public, parse_url

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_MAX_ETAG_CHARS = 256

_SPAN = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")

Resolve = Callable[[str, int], list[str]]
"""From a host name and port to addresses; raises `OSError`."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was written: its sha256 in hex, its size, and the server's name for this version of it."""

    sha256: str
    bytes: int
    etag: str | None


def resolve_name(host: str, port: int) -> list[str]:
    """Return the addresses of a name, as the system resolves it."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Fetcher:
    """Fetches what requests name. `hosts` are those that an operator lists (`parse_hosts`)."""

    def __init__(
        self, hosts: frozenset[str] = frozenset(), limits: Limits = LIMITS, resolve: Resolve = resolve_name
    ) -> None:
        self.hosts = hosts
        self._limits = limits
        self._resolve = resolve
        self._tls = httpx.create_ssl_context()

    def pace(self, tick: Callable[[], None]) -> Pace:
        """Begin the time of a fetch that goes another way than HTTP, such as S3's."""
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

        `token` is sent as bearer to the origin of `url` only. Raises `FetchError`, `OSError` where the file
        cannot be written, and whatever `tick` raises.
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
        """Return the headers of `url`, names in lower case; of redirects only relative ones are followed.

        Raises as `fetch`.
        """
        with self._answer("HEAD", url, {}, token, self.pace(tick), across=False) as answer:
            if answer.status not in _REDIRECTS:
                answer.check(None)
            return answer.headers

    def read(self, url: Url, start: int, stop: int, *, token: str | None = None) -> tuple[bytes, int | None]:
        """Return the bytes of `url`'s body from `start` up to `stop`, and the whole body's size if told.

        There are fewer bytes where the body ends. Of a server that sends all of it no more is read than
        these. `token` as for `fetch`; raises as that.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        with self._answer("GET", url, headers, token, self.pace(lambda: None), across=True) as answer:
            if answer.status == 416:
                return b"", None
            first, size = answer.begin()
            if not first <= start:
                raise FetchError(FetchFault.UNUSABLE, f"{url.host} sends another part of the file.")
            data = bytearray()
            for piece in answer.pieces():
                data += piece
                if len(data) >= stop - first:
                    break
            return bytes(data[start - first : stop - first]), size

    def post(self, url: Url, body: bytes, headers: Mapping[str, str]) -> int:
        """Send `body`, JSON, to `url` and return the status of the answer; redirects are not followed.

        Raises as `fetch`.
        """
        sent = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        with self._request("POST", url, sent, self.pace(lambda: None), body) as answer:
            return answer.status

    @contextmanager
    def _answer(
        self, method: str, url: Url, headers: Mapping[str, str], token: str | None, pace: Pace, across: bool
    ) -> Iterator[_Answer]:
        """Yield the first answer that is no redirect, or none by a relative path unless `across`."""
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
            raise FetchError(FetchFault.UNREACHABLE, f"{url.host} does not answer in time.") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise FetchError(FetchFault.UNREACHABLE, f"The connection to {url.host} failed.") from error

    def _addresses(self, url: Url) -> list[str]:
        """Resolve the host of `url`; every address has to be public, unless the host is listed."""
        try:
            check_url(url, self.hosts)
        except UrlRefused as error:
            raise FetchError(FetchFault.NOT_ALLOWED, str(error)) from error
        try:
            found = [str(url.address)] if url.address else self._resolve(url.host, url.port)
        except OSError as error:
            raise FetchError(FetchFault.UNREACHABLE, f"The name {url.host} does not resolve.") from error
        if not is_listed(url, self.hosts) and not all(is_public(ip_address(address)) for address in found):
            raise FetchError(FetchFault.NOT_ALLOWED, f"{url.host} is not on the public internet.")
        return found


class _Answer:
    """Status and headers of a response, and its body if that is asked for."""

    def __init__(self, url: Url, response: httpcore.Response) -> None:
        self._host = url.host
        self._response = response
        self.status = response.status
        self.headers = {
            name.decode("latin-1").lower(): text.decode("latin-1") for name, text in response.headers
        }

    @property
    def etag(self) -> str | None:
        """The ETag, where it is one that can be sent back."""
        etag = self.headers.get("etag", "")
        return etag if 0 < len(etag) <= _MAX_ETAG_CHARS and etag.isascii() and etag.isprintable() else None

    def check(self, max_bytes: int | None) -> None:
        """Raise `FetchError` unless there is a body as it is, of a size that is not known to be too large."""
        if self.status != 200:
            raise FetchError(fault_of(self.status), f"{self._host} answered {self.status}.")
        self._check_encoding()
        if max_bytes is not None and int(self.headers.get("content-length", 0)) > max_bytes:
            raise too_large(max_bytes)

    def begin(self) -> tuple[int, int | None]:
        """Return where in the whole body this answer's begins, and the size of the whole if it is told.

        Raises `FetchError` as `check`.
        """
        span = _SPAN.fullmatch(self.headers.get("content-range", ""))
        if self.status != 206 or span is None:
            self.check(None)
            length = self.headers.get("content-length")
            return 0, int(length) if length else None
        self._check_encoding()
        return int(span[1]), int(span[2]) if span[2] != "*" else None

    def pieces(self) -> Iterator[bytes]:
        """Yield the body; one that is shorter than announced ends in an error."""
        return iter(self._response.iter_stream())

    def _check_encoding(self) -> None:
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise FetchError(FetchFault.UNUSABLE, f"{self._host} sends the file compressed.")


def _redirection(url: Url, answer: _Answer) -> Url | None:
    if answer.status not in _REDIRECTS or "location" not in answer.headers:
        return None
    try:
        following = parse_url(urljoin(url.full, answer.headers["location"]))
    except ValueError as error:
        raise FetchError(FetchFault.NOT_ALLOWED, f"{url.host} redirects to no usable URL.") from error
    if (url.scheme, following.scheme) == ("https", "http"):
        raise FetchError(FetchFault.NOT_ALLOWED, f"{url.host} redirects from https to http.")
    return following


def fault_of(status: int) -> FetchFault:
    """Return what an HTTP status that is no success means."""
    if status in (404, 410):
        return FetchFault.NOT_FOUND
    if status in (401, 402, 403, 407, 451):
        return FetchFault.DENIED
    again = status in (408, 425, 429) or status >= 500
    return FetchFault.UNREACHABLE if again else FetchFault.UNUSABLE
