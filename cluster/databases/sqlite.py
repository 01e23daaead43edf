"""The job table in one SQLite file, for the processes of one machine."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from cluster.failures import StoreUnavailable

BUSY_S = 5.0
"""How long to wait for another process's write, or for a free connection, before the table counts as
unreachable."""

READERS = 8
"""Connections for reading, shared by the threads of a process. One more connection writes."""

RETRY_LOCK_S = 0.001
"""How often a process that waits for the write lock retries. SQLite itself backs off to 0.1 s. With four
processes writing without a pause, one waited 2.6 s that way and 0.2 s this way (measured)."""

POLL_S = 0.02
"""How often a watch reads SQLite's change counter. One read takes a few microseconds."""


class SqliteDatabase:
    """A job table in one SQLite file, for the processes of one machine."""

    insert = staticmethod(sqlite.insert)
    """The dialect's INSERT, which supports ON CONFLICT."""

    def __init__(self, file: Path) -> None:
        """Create the directory of `file`, an absolute path. SQLite creates the file itself."""
        self._file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                f"the job table's directory cannot be created: {error.strerror}"
            ) from error
        self._reader = _engine(file, READERS)
        # SQLite allows one writer at a time. Threads share this connection; processes wait in `_begin`.
        self._writer = _engine(file, 1)
        event.listen(self._writer, "connect", _disable_busy_timeout)
        event.listen(self._writer, "begin", _begin)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection for reading. Each statement sees the newest commit and waits for no writer."""
        with _reachable(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction, the only one that writes. It is on disk after the block."""
        with _reachable(), self._writer.begin() as connection:
            yield connection

    alone = write
    """The same as `write`: SQLite allows only one writing transaction at a time."""

    def watch(self) -> SqliteWatch:
        """Return a new watch on the file."""
        return SqliteWatch(self._file)

    def close(self) -> None:
        """Close all idle connections."""
        self._reader.dispose()
        self._writer.dispose()


@contextmanager
def _reachable() -> Iterator[None]:
    """Raise `StoreUnavailable` if the file is locked, missing or unreadable, or the disk is full."""
    try:
        yield
    except OperationalError as error:
        raise StoreUnavailable(f"the job table cannot be reached: {error.orig}") from error
    except (NoConnection, sqlite3.OperationalError) as error:
        raise StoreUnavailable(f"the job table cannot be reached: {error}") from error


def _engine(file: Path, connections: int) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(file)),
        connect_args={"timeout": BUSY_S},
        pool_size=connections,
        max_overflow=0,
        pool_timeout=BUSY_S,
        json_serializer=partial(json.dumps, allow_nan=False),
        hide_parameters=True,  # Error messages would contain prompts.
    )
    event.listen(engine, "connect", _prepare)
    return engine


def _prepare(connection: sqlite3.Connection, _record: Any) -> None:  # noqa: ANN401
    """Set up a new connection: we send BEGIN ourselves, and a commit survives a power loss."""
    connection.isolation_level = None
    _execute_when_free(connection, "PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _disable_busy_timeout(connection: sqlite3.Connection, _record: Any) -> None:  # noqa: ANN401
    connection.execute("PRAGMA busy_timeout = 0")


def _begin(connection: Connection) -> None:
    """Take the write lock at once. SQLite does not wait for it after a read in the same transaction."""
    bare: Any = connection.connection.driver_connection
    _execute_when_free(bare, "BEGIN IMMEDIATE")


def _execute_when_free(connection: sqlite3.Connection, statement: str) -> None:
    """Execute a statement, retrying while its lock is held. SQLite does not wait when the mode changes."""
    end = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(RETRY_LOCK_S)


class SqliteWatch:
    """Polls the counter that SQLite increments when another connection commits."""

    def __init__(self, file: Path) -> None:
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._lock = threading.Lock()
        with _reachable():
            self._connection = sqlite3.connect(file, timeout=0, check_same_thread=False)
        self._seen = -1
        self._seen = self._version()

    def wait(self, timeout: float) -> bool:
        """Return True once something was committed since the last True, False after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not self._closed.is_set():
            version = self._version()
            if version != self._seen or self._woken.is_set():
                self._woken.clear()
                self._seen = version
                return True
            left = end - time.monotonic()
            if left <= 0:
                break
            self._closed.wait(min(POLL_S, left))
        return False

    def wake(self) -> None:
        """Make the current or next `wait` return True at its next poll."""
        self._woken.set()

    def close(self) -> None:
        """Close the connection. A waiting thread returns False."""
        with self._lock:
            self._closed.set()
            self._connection.close()

    def _version(self) -> int:
        with self._lock:
            if self._closed.is_set():
                return self._seen
            try:
                return self._connection.execute("PRAGMA data_version").fetchone()[0]
            except sqlite3.OperationalError:
                return self._seen
