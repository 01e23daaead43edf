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
"""How long a write of another process, or a turn for a connection, is waited for before the table counts as
away."""

READERS = 8
"""Connections for reading that the threads of one process share; one more writes."""

TURN_S = 0.001
"""How often a process that waits to write looks whether it can. SQLite's own waiting backs off to 0.1 s; with
four processes that write without a pause it kept one out for 2.6 s, this for 0.2 s (measured)."""

POLL_S = 0.02
"""How often a watch looks at SQLite's change counter; a look costs some microseconds."""


class SqliteDatabase:
    """A job table in one SQLite file, for the processes of one machine."""

    insert = staticmethod(sqlite.insert)
    """The dialect's own INSERT, which knows ON CONFLICT."""

    def __init__(self, file: Path) -> None:
        """Name the file, absolute; its directory is made, the file comes with the first write."""
        self._file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"the job table's directory cannot be made: {error.strerror}") from error
        self._reader = _engine(file, READERS)
        # SQLite has one writer at a time: threads take turns for its connection, processes in `_begin`.
        self._writer = _engine(file, 1)
        event.listen(self._writer, "connect", _wait_by_ourselves)
        event.listen(self._writer, "begin", _begin)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection whose statements each see the newest commit and wait for no writer."""
        with _reachable(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction that is alone in writing; on leaving it is on disk."""
        with _reachable(), self._writer.begin() as connection:
            yield connection

    alone = write
    """SQLite lets one transaction write at a time."""

    def watch(self) -> SqliteWatch:
        """Return a new watch of the file."""
        return SqliteWatch(self._file)

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._reader.dispose()
        self._writer.dispose()


@contextmanager
def _reachable() -> Iterator[None]:
    """Turn a locked, absent, full or unreadable store into `StoreUnavailable`."""
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
        hide_parameters=True,  # Prompts, in the texts of errors.
    )
    event.listen(engine, "connect", _prepare)
    return engine


def _prepare(connection: sqlite3.Connection, _record: Any) -> None:  # noqa: ANN401
    """Set up a new connection: transactions begin where we say so, and a commit survives a power loss."""
    connection.isolation_level = None
    _patiently(connection, "PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _wait_by_ourselves(connection: sqlite3.Connection, _record: Any) -> None:  # noqa: ANN401
    connection.execute("PRAGMA busy_timeout = 0")


def _begin(connection: Connection) -> None:
    """Begin with the write lock: one wanted later, after a read, could not be waited for."""
    bare: Any = connection.connection.driver_connection
    _patiently(bare, "BEGIN IMMEDIATE")


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Execute a statement as soon as its lock is free; SQLite itself does not wait for a change of mode."""
    end = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(TURN_S)


class SqliteWatch:
    """Polls the counter that SQLite raises when another connection commits."""

    def __init__(self, file: Path) -> None:
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._lock = threading.Lock()
        with _reachable():
            self._connection = sqlite3.connect(file, timeout=0, check_same_thread=False)
        self._seen = -1
        self._seen = self._version()

    def wait(self, timeout: float) -> bool:
        """Block up to `timeout` seconds; True as soon as something was committed since the last True."""
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
        """Let the thread that waits, or the next one, return True at its next look."""
        self._woken.set()

    def close(self) -> None:
        """Close the connection; a thread that waits returns False."""
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
