"""Connections of the guarded fetcher: only to checked addresses, within the limits of the fetch."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

from cluster.net.limits import FetchError, FetchFault, Pace


class Pinned(httpcore.NetworkBackend):
    """Connects to one of the given addresses, whatever the host name, and enforces the fetch's limits."""

    def __init__(self, addresses: Iterable[str], pace: Pace) -> None:
        self._addresses = addresses
        self._pace = pace

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers."""
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, port, self._pace.left())
                return _Paced(stream, self._pace)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _Paced(httpcore.NetworkStream):
    """A connection that enforces the fetch's limits."""

    def __init__(self, stream: httpcore.NetworkStream, pace: Pace) -> None:
        self._stream = stream
        self._pace = pace

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, self._pace.left())
        self._pace.note(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._pace.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            secured = self._stream.start_tls(ssl_context, server_hostname, self._pace.left())
        except httpcore.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                message = f"{server_hostname} has no valid certificate."
                raise FetchError(FetchFault.UNUSABLE, message) from error
            raise
        return _Paced(secured, self._pace)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore's signature
        return self._stream.get_extra_info(info)
