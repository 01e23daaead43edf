"""A PostgreSQL server for tests; each test gets its own database."""

from __future__ import annotations

import subprocess
import tempfile
import uuid
from pathlib import Path

import pgserver
import psycopg
from pgserver.postgres_server import get_server

_PG_CTL = Path(pgserver.__file__).parent / "pginstall" / "bin" / "pg_ctl"


class PostgresServer:
    """A server on a Unix socket in the temporary directory. The constructor starts it."""

    def __init__(self, *, flush: bool) -> None:
        """Start. Without `flush`, tests run faster but commits may be lost if the machine crashes."""
        self._server = get_server(Path(tempfile.mkdtemp(prefix="jobs-pg-")), cleanup_mode="delete")
        if not flush:
            self._execute("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")

    @property
    def pid(self) -> int:
        """The process id of the server, the parent of the processes that serve connections."""
        return self._server.get_postmaster_info().pid

    @property
    def folder(self) -> Path:
        """The folder of all the server's files, its log included."""
        return Path(self._server.pgdata)

    def create(self) -> str:
        """Make an empty database; return its URL."""
        name = f"jobs_{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {name}")
        return self._server.get_uri(name)

    def drop(self, url: str) -> None:
        """Drop a database and close the connections to it."""
        name = url.partition("?")[0].rpartition("/")[2]
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def stop(self) -> None:
        """Stop at once: connections break and uncommitted changes are lost."""
        command = [_PG_CTL, "-D", self._server.pgdata, "-w", "-m", "fast", "stop"]
        subprocess.run(command, user=self._server.system_user, check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        """Start again with the same data on the same socket."""
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop for good and delete everything."""
        self._server.cleanup()

    def _execute(self, *statements: str) -> None:
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())
