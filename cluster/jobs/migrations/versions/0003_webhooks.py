"""Adds webhooks: the URL to notify when a job ends, and when that is due."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("secret", sa.Text),
        sa.Column("events", sa.Text, nullable=False),
        sa.Column("due_at", sa.Double),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("delivered_at", sa.Double),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("job_id", name="webhooks_pkey"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="webhooks_job_id_fkey", ondelete="CASCADE"),
    )
    op.create_index("webhooks_by_due", "webhooks", ["due_at"])
