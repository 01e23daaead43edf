"""The job table in PostgreSQL, for processes on any number of nodes.

Transactions can go through PgBouncer in transaction mode: they leave nothing on the server, neither prepared
statements nor session settings. Only the listening connection needs a session.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import URL
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from cluster.failures import StoreUnavailable
from cluster.telemetry import redact

logger = logging.getLogger(__name__)

CONNECTIONS = 8
"""Maximum connections per process, opened when a thread needs one. One more connection listens."""

CONNECT_S = 2
"""Timeout for a new connection. Together with the next two it is a third of the default lease: a heartbeat
that finds no server can still retry, and stop its job before another worker gets it."""

POOL_WAIT_S = 3.0
"""How long a thread waits for a free connection of the process."""

ANSWER_S = 5.0
"""Time limit of a read, or of a transaction up to its commit."""

MIGRATION_S = 600.0
"""Time limit of a schema change, including index builds and the wait for the advisory lock."""

UNHEARD_REPORT_S = 1.0
"""While the feed is disconnected, watches report a possible change this often."""

LISTEN_POLL_S = 0.1
"""How often the listening thread checks whether to stop."""

CHANNEL = "jobs"
"""The LISTEN channel that is notified when jobs are queued or end."""

_MIGRATIONS = 0x6C6F7261
"""Number of the advisory lock of `alone`. Nothing else in the database may use it."""


class PostgresDatabase:
    """A job table in a PostgreSQL database, version 13 or newer."""

    insert = staticmethod(postgresql.insert)

    def __init__(self, url: URL, listen_url: URL) -> None:
        """Set the URLs. `listen_url` must bypass any connection pooler: the change feed needs a session."""
        self._engine = _engine(url, CONNECTIONS)
        self._listen_url = listen_url
        self._feed: _Feed | None = None
        self._lock = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection for reading. Each statement is its own transaction: one round trip."""
        with _reachable(), self._engine.connect() as connection:
            _allow(connection, ANSWER_S)
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction: on disk after the block, rolled back after an error."""
        with self._transaction(ANSWER_S) as connection:
            yield connection

    @contextmanager
    def alone(self) -> Iterator[Connection]:
        """Like `write`, but under an advisory lock and with time for schema changes."""
        with self._transaction(MIGRATION_S) as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATIONS})")
            yield connection

    def watch(self) -> PostgresWatch:
        """Return a new watch. The first one starts the listening thread."""
        with self._lock:
            self._feed = self._feed or _Feed(self._listen_url)
            return PostgresWatch(self._feed)

    def close(self) -> None:
        """Stop listening and close all idle connections."""
        with self._lock:
            if self._feed is not None:
                self._feed.close()
                self._feed = None
        self._engine.dispose()

    @contextmanager
    def _transaction(self, seconds: float) -> Iterator[Connection]:
        with _reachable(), self._engine.connect() as connection, connection.begin():
            _allow(connection, seconds)
            limit = f"{seconds * 1000:.0f}"
            # One message for all. The server's time limits free the locks of a process that hangs. Without
            # sorting, claims walk the index that has their order, whatever the statistics say: those of a
            # queue are missing or outdated. Such plans look expensive, so they would trigger the JIT.
            connection.exec_driver_sql(
                "BEGIN ISOLATION LEVEL READ COMMITTED;"
                f"SET LOCAL statement_timeout = {limit};"
                f"SET LOCAL idle_in_transaction_session_timeout = {limit};"
                "SET LOCAL enable_sort = off;"
                "SET LOCAL jit = off"
            )
            yield connection


class _Connection(psycopg.Connection[Any]):
    """A connection that gives up at the monotonic time `until`. The driver alone would wait forever."""

    until = math.inf

    def wait(self, gen: PQGen[Any], *args: Any, **options: Any) -> Any:  # noqa: ANN401
        return super().wait(self._in_time(gen), *args, **options)

    def _in_time(self, gen: PQGen[Any]) -> PQGen[Any]:
        """Run `gen` until the deadline. Without I/O the driver resumes it about every 0.1 s."""
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > self.until:
                    self.close()
                    raise psycopg.OperationalError("the server did not answer in time")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


def _engine(url: URL, connections: int) -> Engine:
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args={
            "autocommit": True,  # We send BEGIN ourselves.
            "prepare_threshold": None,
            "connect_timeout": CONNECT_S,
            "tcp_user_timeout": int(ANSWER_S * 1000),
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "application_name": "lora-serve",
        },
        pool_size=connections,
        max_overflow=0,
        pool_timeout=POOL_WAIT_S,
        json_serializer=partial(json.dumps, allow_nan=False),
        hide_parameters=True,  # Error messages would contain prompts.
    )
    event.listen(engine, "do_connect", _connect)
    return engine


def _connect(_dialect: Any, _record: Any, args: Any, options: Any) -> _Connection:  # noqa: ANN401
    connection = _Connection.connect(*args, **options)
    connection.until = time.monotonic() + ANSWER_S
    return connection


def _bare(connection: Connection) -> _Connection:
    bare: Any = connection.connection.driver_connection
    return bare


def _allow(connection: Connection, seconds: float) -> None:
    _bare(connection).until = time.monotonic() + seconds


@contextmanager
def _reachable() -> Iterator[None]:
    """Raise `StoreUnavailable` if the server is down, hung, busy, full or read-only."""
    try:
        yield
    except (OperationalError, InterfaceError, InternalError) as error:
        raise _unavailable(error.orig) from error
    except (psycopg.OperationalError, NoConnection) as error:
        raise _unavailable(error) from error


def _unavailable(cause: BaseException | None) -> StoreUnavailable:
    """Build the error from the first line of `cause`; the other lines are hints from the server."""
    first_line = str(cause).partition("\n")[0]
    return StoreUnavailable(f"the job table cannot be reached: {redact(first_line)}")


class _Feed:
    """Listens for all watches of a process, with one connection and one thread."""

    def __init__(self, url: URL) -> None:
        self.news = threading.Condition()
        self.count = 0
        self._tried = threading.Event()
        self._closing = threading.Event()
        self._engine = _engine(url, 1)
        self._thread = threading.Thread(target=self._run, name="job-feed", daemon=True)
        self._thread.start()
        self._tried.wait(CONNECT_S + ANSWER_S)

    def close(self) -> None:
        """Stop listening. Blocks until the connection is closed."""
        self._closing.set()
        self._thread.join()
        self._engine.dispose()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with _reachable(), self._engine.connect() as connection:
                    try:
                        self._listen(connection)
                    finally:
                        connection.invalidate()
            except StoreUnavailable as error:
                logger.warning("not listening for job changes, retrying: %s", error)
                self._tried.set()
                self._closing.wait(UNHEARD_REPORT_S)
                self._notify()

    def _listen(self, connection: Connection) -> None:
        bare = _bare(connection)
        bare.execute(f"LISTEN {CHANNEL}")
        bare.until = math.inf
        # Commits before LISTEN were missed.
        self._notify()
        self._tried.set()
        while not self._closing.is_set():
            for _ in bare.notifies(timeout=LISTEN_POLL_S, stop_after=1):
                self._notify()

    def _notify(self) -> None:
        with self.news:
            self.count += 1
            self.news.notify_all()


class PostgresWatch:
    """One thread's watch on the process's feed."""

    def __init__(self, feed: _Feed) -> None:
        self._feed = feed
        self._seen = feed.count
        self._woken = False
        self._closed = False

    def wait(self, timeout: float) -> bool:
        """Return True once a job was queued or has ended since the last call, False after `timeout` s."""
        with self._feed.news:
            self._feed.news.wait_for(lambda: self._closed or self._changed, timeout)
            changed = not self._closed and self._changed
            self._seen, self._woken = self._feed.count, False
        return changed

    @property
    def _changed(self) -> bool:
        return self._woken or self._feed.count != self._seen

    def wake(self) -> None:
        """Make the current or next `wait` return True."""
        with self._feed.news:
            self._woken = True
            self._feed.news.notify_all()

    def close(self) -> None:
        """End the watch. A waiting thread returns False."""
        with self._feed.news:
            self._closed = True
            self._feed.news.notify_all()
