"""Secrets of jobs, the jobs of one tenant, jobs by their end; PostgreSQL keeps room for changes of rows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("secret", sa.Text))
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "state", "seq"])
    op.create_index("jobs_by_end", "jobs", ["finished_at"])
    if op.get_bind().dialect.name == "postgresql":
        # A heartbeat changes no indexed column: with room in its page it touches no index. Dead versions of
        # rows go early, because claims walk past them at the head of the queue.
        op.execute(
            "ALTER TABLE jobs SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02,"
            " autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02)"
        )
