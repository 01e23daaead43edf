"""Alembic migrations of the job table's schema."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def upgrade(connection: Connection) -> None:
    """Upgrade the schema to the newest revision, in the caller's transaction.

    The transaction must come from `Database.alone`. It keeps out other processes, and also other threads,
    because Alembic's environment is global. Raises `alembic.util.CommandError` if the schema is newer than
    this program.
    """
    config = Config()
    config.set_main_option("script_location", "cluster.jobs:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
