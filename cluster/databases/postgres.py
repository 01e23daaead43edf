"""The job table in PostgreSQL, for processes on any number of nodes.

Nothing here outlives a transaction on the server but the connection that listens: no prepared statements, no
settings of a session. So transactions may go through PgBouncer in transaction mode.
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
"""Most connections of one process, each opened when a thread first needs it; one more listens."""

CONNECT_S = 2
"""How long a new connection may take. With the next two a third of the default lease: a heartbeat that finds
no server has time to try again, and to stop its job before another worker has it."""

TURN_S = 3.0
"""How long a thread waits for one of the process's connections."""

ANSWER_S = 5.0
"""How long a transaction, or a read, may take from its begin to its commit."""

MIGRATION_S = 600.0
"""How long a change of the schema may take, building indexes and waiting for its turn."""

DEAF_S = 1.0
"""While changes cannot be heard, how often watches report that there may have been some."""

HEAR_S = 0.1
"""How often the listening thread looks whether it is to end."""

CHANNEL = "jobs"
"""What a transaction that changes a job's state notifies."""

_MIGRATIONS = 0x6C6F7261
"""The advisory lock of `alone`, a number that nothing else in the database may use."""


class PostgresDatabase:
    """A job table in one PostgreSQL database, version 13 or newer."""

    insert = staticmethod(postgresql.insert)

    def __init__(self, url: URL, listen_url: URL) -> None:
        """Name the database, and the way past any connection pooler that its change feed needs."""
        self._engine = _engine(url, CONNECTIONS)
        self._listen_url = listen_url
        self._feed: _Feed | None = None
        self._lock = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection whose statements are each a transaction of their own: one round trip."""
        with _reachable(), self._engine.connect() as connection:
            _allow(connection, ANSWER_S)
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction; on leaving it is on disk, after an error it is undone."""
        with self._transaction(ANSWER_S) as connection:
            yield connection

    @contextmanager
    def alone(self) -> Iterator[Connection]:
        """As `write`, under an advisory lock and with time for changes of the schema."""
        with self._transaction(MIGRATION_S) as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATIONS})")
            yield connection

    def watch(self) -> PostgresWatch:
        """Return a new watch; the first one makes the process listen."""
        with self._lock:
            self._feed = self._feed or _Feed(self._listen_url)
            return PostgresWatch(self._feed)

    def close(self) -> None:
        """Stop listening and close all connections that are not in use."""
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
            # One message. The server's own limits free what a process locks that stops in the middle. The
            # other two settings make claims walk the index that has their order, whatever statistics say:
            # those of a queue are absent or of another hour. (Plans without an alternative are costly on
            # paper: no JIT.)
            connection.exec_driver_sql(
                "BEGIN ISOLATION LEVEL READ COMMITTED;"
                f"SET LOCAL statement_timeout = {limit};"
                f"SET LOCAL idle_in_transaction_session_timeout = {limit};"
                "SET LOCAL enable_sort = off;"
                "SET LOCAL jit = off"
            )
            yield connection


class _Connection(psycopg.Connection[Any]):
    """A connection that gives up at the time `until`; the driver itself waits for ever."""

    until = math.inf

    def wait(self, gen: PQGen[Any], *args: Any, **options: Any) -> Any:  # noqa: ANN401
        return super().wait(self._in_time(gen), *args, **options)

    def _in_time(self, gen: PQGen[Any]) -> PQGen[Any]:
        """Run `gen`. A turn without news comes about every 0.1 s."""
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
            "autocommit": True,  # Transactions begin where we say so.
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
        pool_timeout=TURN_S,
        json_serializer=partial(json.dumps, allow_nan=False),
        hide_parameters=True,  # Prompts, in the texts of errors.
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
    """Turn an absent, hung, busy, full or read-only server into `StoreUnavailable`."""
    try:
        yield
    except (OperationalError, InterfaceError, InternalError) as error:
        raise _unavailable(error.orig) from error
    except (psycopg.OperationalError, NoConnection) as error:
        raise _unavailable(error) from error


def _unavailable(cause: BaseException | None) -> StoreUnavailable:
    """Tell the cause in one line; the others are the server's advice."""
    told = str(cause).partition("\n")[0]
    return StoreUnavailable(f"the job table cannot be reached: {redact(told)}")


class _Feed:
    """Listens for all watches of a process, on one connection and one thread."""

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
        """Stop listening; blocks until the connection is closed."""
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
                logger.warning("changes of jobs are not heard: %s", error)
                self._tried.set()
                self._closing.wait(DEAF_S)
                self._tell()

    def _listen(self, connection: Connection) -> None:
        bare = _bare(connection)
        bare.execute(f"LISTEN {CHANNEL}")
        bare.until = math.inf
        # Whatever was committed before was not heard.
        self._tell()
        self._tried.set()
        while not self._closing.is_set():
            for _ in bare.notifies(timeout=HEAR_S, stop_after=1):
                self._tell()

    def _tell(self) -> None:
        with self.news:
            self.count += 1
            self.news.notify_all()


class PostgresWatch:
    """One thread's view of the process's feed."""

    def __init__(self, feed: _Feed) -> None:
        self._feed = feed
        self._seen = feed.count
        self._woken = False
        self._closed = False

    def wait(self, timeout: float) -> bool:
        """Block up to `timeout` seconds; True as soon as a job was queued or has ended since the last."""
        with self._feed.news:
            self._feed.news.wait_for(lambda: self._closed or self._changed, timeout)
            changed = not self._closed and self._changed
            self._seen, self._woken = self._feed.count, False
        return changed

    @property
    def _changed(self) -> bool:
        return self._woken or self._feed.count != self._seen

    def wake(self) -> None:
        """Let the thread that waits, or the next one, return True."""
        with self._feed.news:
            self._woken = True
            self._feed.news.notify_all()

    def close(self) -> None:
        """End the watch; a thread that waits returns False."""
        with self._feed.news:
            self._closed = True
            self._feed.news.notify_all()
