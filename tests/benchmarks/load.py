"""Load generator for an HTTP server, in its own process: some clients, each with one request in flight.

Plain sockets in one loop: a request costs the generator a few hundredths of a millisecond, little compared
with the server's work on the same machine.
"""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle

ANSWER_S = 30.0
"""The benchmark gives up after this many seconds without data from the server."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

_ID = re.compile(rb'"request_id":"([0-9a-f-]{36})"')


@dataclass
class Answers:
    """The clients' answers within `took_s` seconds: seconds of each, statuses, and ids from the 200s."""

    took_s: float = 0.0

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    reconnects: int = 0


def drive(port: int, requests: Sequence[bytes], clients: int, duration_s: float) -> Answers:
    """Send `requests` in turns; each client sends the next when it has its answer. Stop after `duration_s`.

    Requests in flight at that time are still answered and counted. Raises `OSError` if an answer breaks off
    or nothing arrives for `ANSWER_S` seconds.
    """
    answers, following, begun = Answers(), cycle(requests), time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for _ in range(clients):
            _Client(port, selector).send(next(following))
        while selector.get_map():
            ready = selector.select(ANSWER_S)
            if not ready:
                raise TimeoutError(f"no answer in {ANSWER_S} s")
            for key, _ in ready:
                client: _Client = key.data
                if client.receive(answers):
                    if time.perf_counter() < begun + duration_s:
                        client.send(next(following))
                    else:
                        client.close()
    answers.took_s = time.perf_counter() - begun
    return answers


class _Client:
    def __init__(self, port: int, selector: selectors.BaseSelector) -> None:
        self._port = port
        self._selector = selector
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(self._socket, selectors.EVENT_READ, self)

    def send(self, request: bytes) -> None:
        self._request = request
        self._received = b""
        self._sent_at = time.perf_counter()
        self._socket.sendall(request)

    def receive(self, answers: Answers) -> bool:
        """Read the available bytes; return True if the answer is complete."""
        try:
            piece = self._socket.recv(65536)
        except ConnectionResetError:
            piece = b""
        if not piece:
            self._send_again()
            answers.reconnects += 1
            return False
        self._received += piece
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return False
        answers.seconds.append(time.perf_counter() - self._sent_at)
        status = int(head[9:12])
        answers.statuses[status] = answers.statuses.get(status, 0) + 1
        if status == 200:
            answers.ids += (found.decode() for found in _ID.findall(body))
        return True

    def _send_again(self) -> None:
        """Retry on a new connection, as HTTP clients do when a reloading proxy has closed the idle one."""
        if self._received:
            raise ConnectionError("the server closed the connection within an answer")
        self.close()
        self._connect()
        self._socket.sendall(self._request)

    def close(self) -> None:
        self._selector.unregister(self._socket)
        self._socket.close()


def http(method: str, path: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
