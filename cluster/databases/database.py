"""Opens the database of the job table. `Database` and `Watch` are the interfaces that each one implements."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from cluster.databases.postgres import CHANNEL, PostgresDatabase
from cluster.databases.sqlite import SqliteDatabase

Insert = Callable[[Table], sqlite.Insert | postgresql.Insert]
"""The dialect's INSERT, which supports ON CONFLICT."""

_FORMS = "use sqlite:///path/to/jobs.db or postgresql://user:password@host/database"


def jobs_url(configured: str) -> str:
    """Return the URL of the job table: the environment variable `JOBS_URL` if set, else `configured`.

    Put a URL with a password into the environment: Serve logs the arguments of its applications.
    """
    return os.environ.get("JOBS_URL") or configured


class Watch(Protocol):
    """Wakes one thread when the job table may have changed. Each waiting thread needs its own watch."""

    def wait(self, timeout: float) -> bool:
        """Return True once a job was queued or has ended since the last True, False after `timeout` seconds.

        There is no wake-up when a job's back-off ends, because the table does not change. True can also mean
        another change, or that a change may have been missed.
        """
        ...

    def wake(self) -> None:
        """Make the current or next `wait` return True, for a change outside the table."""
        ...

    def close(self) -> None:
        """End the watch. A waiting thread returns False."""
        ...


class Database(Protocol):
    """A database that holds the job table, shared by the threads of a process.

    Every method raises `StoreUnavailable` if the database is unreachable.
    """

    @property
    def insert(self) -> Insert:
        """The dialect's INSERT."""
        ...

    def read(self) -> AbstractContextManager[Connection]:
        """Yield a connection for reading. Each statement sees the newest commit and waits for no writer."""
        ...

    def write(self) -> AbstractContextManager[Connection]:
        """Yield a connection in a transaction: on disk after the block, rolled back after an error."""
        ...

    def alone(self) -> AbstractContextManager[Connection]:
        """Like `write`, but only one such transaction runs at a time, and it has time for schema changes."""
        ...

    def watch(self) -> Watch:
        """Return a new watch on the whole table."""
        ...

    def close(self) -> None:
        """Close all idle connections."""
        ...


def open_database(url: str) -> Database:
    """Return the database at `sqlite:///PATH` or `postgresql://...`, without connecting to it.

    A relative path starts at the working directory. The change feed of PostgreSQL needs a connection that
    bypasses any connection pooler: the environment variable `JOBS_LISTEN_URL`, if set, is its URL. Raises
    `ValueError` for any other URL, without repeating it, and `StoreUnavailable` if the directory of a SQLite
    file cannot be created.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "postgresql":
        listen = os.environ.get("JOBS_LISTEN_URL")
        return PostgresDatabase(parsed, _parsed(listen) if listen else parsed)
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"{parsed.get_backend_name()} is not supported for the job table; {_FORMS}")
    if not parsed.database or parsed.database == ":memory:":
        raise ValueError(f"the job table needs a file, because several processes share it; {_FORMS}")
    return SqliteDatabase(Path(parsed.database).absolute())


def is_shared(url: str) -> bool:
    """Return whether all nodes can use the table at `url`; an SQLite file is of one machine."""
    return not url.startswith("sqlite")


def notify_watches(connection: Connection) -> None:
    """Wake all watches on the table when this transaction commits. SQLite's watches poll instead."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"NOTIFY {CHANNEL}")


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"the job table's URL is not valid; {_FORMS}") from None
    if "@" in (parsed.host or ""):
        # Errors name the host, which here contains the rest of the password.
        raise ValueError(f"write an @ in the job table's user or password as %40; {_FORMS}")
    return parsed
