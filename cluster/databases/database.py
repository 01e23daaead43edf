"""Where the job table is, and what its database has to offer: transactions and a change feed."""

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
"""A dialect's own INSERT, which knows ON CONFLICT."""

_FORMS = "use sqlite:///path/to/jobs.db or postgresql://user:password@host/database"


def jobs_url(configured: str) -> str:
    """Return the URL of the job table: the environment's `JOBS_URL` before the configured one.

    A URL with a password belongs into the environment: Serve logs the arguments of its applications.
    """
    return os.environ.get("JOBS_URL") or configured


class Watch(Protocol):
    """Tells one thread when the job table may have changed; every waiting thread needs its own."""

    def wait(self, timeout: float) -> bool:
        """Block up to `timeout` seconds; True as soon as a job was queued or has ended since the last True.

        Time alone wakes nobody: a job in back-off becomes claimable without a change of the table. True may
        also come of another change, or mean that one could have gone unnoticed.
        """
        ...

    def wake(self) -> None:
        """Let the thread that waits, or the next one, return True: something else has changed."""
        ...

    def close(self) -> None:
        """End the watch; a thread that waits returns False."""
        ...


class Database(Protocol):
    """A database that holds the job table, shared by the threads of a process.

    Everything raises `StoreUnavailable` when the database cannot be reached.
    """

    @property
    def insert(self) -> Insert:
        """The dialect's own INSERT."""
        ...

    def read(self) -> AbstractContextManager[Connection]:
        """Yield a connection whose statements each see the newest commit and wait for no writer."""
        ...

    def write(self) -> AbstractContextManager[Connection]:
        """Yield a connection in a transaction; on leaving it is on disk, after an error it is undone."""
        ...

    def alone(self) -> AbstractContextManager[Connection]:
        """As `write`, with no other such transaction beside it and time for changes of the schema."""
        ...

    def watch(self) -> Watch:
        """Return a new watch of the whole table."""
        ...

    def close(self) -> None:
        """Close all connections that are not in use."""
        ...


def open_database(url: str) -> Database:
    """Return the database at `sqlite:///PATH` or `postgresql://...`, not connected yet.

    A relative path starts at the working directory. `JOBS_LISTEN_URL` of the environment names the same
    PostgreSQL database past a connection pooler, for its change feed. Raises `ValueError` for any other URL,
    without repeating it, and `StoreUnavailable` when the directory of a file cannot be made.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "postgresql":
        listen = os.environ.get("JOBS_LISTEN_URL")
        return PostgresDatabase(parsed, _parsed(listen) if listen else parsed)
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"{parsed.get_backend_name()} is not supported as job table; {_FORMS}")
    if not parsed.database or parsed.database == ":memory:":
        raise ValueError(f"the job table is shared by processes and needs a file; {_FORMS}")
    return SqliteDatabase(Path(parsed.database).absolute())


def notify_watches(connection: Connection) -> None:
    """Wake every watch of the table when this transaction commits; SQLite's watches poll."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"NOTIFY {CHANNEL}")


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"the job table's URL cannot be read; {_FORMS}") from None
    if "@" in (parsed.host or ""):
        # The host's name is told in errors, and here it has the rest of a password in it.
        raise ValueError(f"an @ in the job table's user or password has to be written as %40; {_FORMS}")
    return parsed
