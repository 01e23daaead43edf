"""The history of the job table's schema, as Alembic revisions."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest revision, in the caller's transaction.

    The transaction has to be the only one of its kind (`Database.alone`): it keeps other processes, and other
    threads of this one (Alembic's environment is global), out until the schema is there. Raises
    `alembic.util.CommandError` when the schema is newer than this program.
    """
    config = Config()
    config.set_main_option("script_location", "cluster.jobs:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
