"""Alembic's entry point: runs migrations on the connection, and in the transaction, passed to `upgrade`."""

from __future__ import annotations

from alembic import context

from cluster.jobs.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
