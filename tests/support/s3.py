"""A real S3 server for tests, and a proxy that injects faults between it and its clients."""

from __future__ import annotations

import math
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from tests.support.service import wait_until

BUCKET = "pictures"
ACCESS_KEY, SECRET = "test-access-key-1", "test-secret-key-of-some-length"


@dataclass(frozen=True)
class S3Server:
    """`rclone serve s3` with the bucket `BUCKET`; it checks signatures."""

    url: str
    log: Path

    def parts(self, name: str) -> int:
        """Return how many parts of an object were uploaded."""
        return self.log.read_text().count(f"put multipart upload {BUCKET} {name} ")

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for a client with valid keys; they disable credential files and roles."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "eu-central-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def name_in_bucket(s3_url: str, key: str) -> str:
    """Return the server's object name for a key of the store at `s3_url`."""
    return f"{urlsplit(s3_url).path[1:]}/{key}"


@contextmanager
def serving_s3(folder: Path) -> Iterator[S3Server]:
    """Run the server on a free port until the block ends."""
    buckets, log = folder / "buckets", folder / "rclone.log"
    (buckets / BUCKET).mkdir(parents=True)
    rclone = Path(sys.executable).with_name("rclone")
    options = [
        "--config=",  # Ignore the settings of the machine's user.
        "-vv",
        "--addr=127.0.0.1:0",
        f"--auth-key={ACCESS_KEY},{SECRET}",
    ]
    command = [rclone, "serve", "s3", *options, buckets]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        address = wait_until(
            lambda: re.search(r"http://[\d.]+:\d+", log.read_text()), 30, "the S3 server's start"
        )
        yield S3Server(address[0], log)
    finally:
        process.terminate()
        process.wait(30)


Fault: TypeAlias = Callable[[socket.socket, socket.socket], None]
"""Handles one connection, given the client's and the server's socket. Both are closed afterwards."""


class Proxy:
    """TCP proxy in front of a server. Each new connection takes the next of `faults`, then `otherwise`."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.faults: deque[Fault] = deque()
        self.otherwise: Fault = passed_on
        self._clients: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self) -> None:
        """Close the open connections, so that the next request needs a new one."""
        for client in list(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                fault = self.faults.popleft() if self.faults else self.otherwise
                threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        self._clients.add(client)
        with client, socket.create_connection(self._upstream) as server, suppress(OSError):
            fault(client, server)
            # `close` alone would wait for the thread that still reads from it.
            server.shutdown(socket.SHUT_RDWR)
        self._clients.discard(client)


def passed_on(client: socket.socket, server: socket.socket) -> None:
    """Forward everything in both directions."""
    back = threading.Thread(target=_pump, args=(server, client), daemon=True)
    back.start()
    _pump(client, server)
    back.join()


def refused(client: socket.socket, server: socket.socket) -> None:
    """Answer like an overloaded store."""
    client.recv(65536)
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    _answer(client, "503 Slow Down", "Content-Type: application/xml", body)


def broken(client: socket.socket, server: socket.socket) -> None:
    """Answer like a store that fails after it has begun to send an object."""
    while (request := client.recv(65536)).startswith(b"HEAD"):
        server.sendall(request)
        client.sendall(server.recv(65536))
    _answer(client, "500 Internal Server Error", "x-amz-checksum-crc32: AAAAAA==", b"")


def delayed(seconds: float) -> Fault:
    """Forward everything after a delay."""

    def fault(client: socket.socket, server: socket.socket) -> None:
        time.sleep(seconds)
        passed_on(client, server)

    return fault


def reset_after_sending(size: int) -> Fault:
    """Reset the connection after the client has sent `size` bytes."""

    def fault(client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_pump, args=(server, client), daemon=True).start()
        _pump(client, server, size)
        # Closing it like this sends the client RST instead of FIN.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return fault


def cut_after_receiving(size: int) -> Fault:
    """Close the connection after the server has sent `size` bytes."""

    def fault(client: socket.socket, server: socket.socket) -> None:
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        _pump(server, client, size)
        client.shutdown(socket.SHUT_RDWR)

    return fault


def silent(client: socket.socket, server: socket.socket) -> None:
    """Read what the client sends and never answer."""
    while client.recv(65536):
        pass


def _answer(client: socket.socket, status: str, field: str, body: bytes) -> None:
    head = f"HTTP/1.1 {status}\r\n{field}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    client.sendall(head.encode() + body)


def _pump(source: socket.socket, sink: socket.socket, size: float = math.inf) -> None:
    """Forward `size` bytes; if the source ends earlier, end the sink too."""
    with suppress(OSError):
        while size > 0 and (data := source.recv(int(min(size, 65536)))):
            sink.sendall(data)
            size -= len(data)
        if size > 0:
            sink.shutdown(socket.SHUT_WR)
