"""Adds secrets, indexes by tenant and by end time, and storage settings for updates in PostgreSQL."""

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
        # A heartbeat changes no indexed column, so with free space in the page it updates no index. Vacuum
        # early, because claims walk past dead row versions at the head of the queue.
        op.execute(
            "ALTER TABLE jobs SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02,"
            " autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02)"
        )
