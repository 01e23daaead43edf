"""Adds the batch of a job, and an index for jobs that have one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("batch", sa.Text))
    belongs = sa.text("batch IS NOT NULL")
    op.create_index(
        "jobs_by_batch",
        "jobs",
        ["tenant", "batch", "state", "seq"],
        sqlite_where=belongs,
        postgresql_where=belongs,
    )
