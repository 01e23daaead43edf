"""Creates the job queue: jobs, their outputs and events, the replicas and the adapters they hold."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", _SERIAL, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("fingerprint", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("lease_until", sa.Double),
        sa.Column("deadline", sa.Double),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("progress", sa.JSON),
        sa.Column("error", sa.Text),
        sa.Column("error_code", sa.Text),
        sa.Column("result", sa.JSON),
        sa.PrimaryKeyConstraint("seq", name="jobs_pkey"),
        sa.UniqueConstraint("id", name="jobs_id_key"),
        sa.UniqueConstraint("tenant", "idempotency_key", name="jobs_tenant_idempotency_key_key"),
    )
    op.create_index("jobs_by_age", "jobs", ["state", "model", "created_at", "seq"])
    op.create_index("jobs_by_adapter", "jobs", ["state", "model", "adapter", "created_at", "seq"])
    op.create_table(
        "job_outputs",
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("prompt_index", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("output", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "prompt_index", name="job_outputs_pkey"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="job_outputs_job_id_fkey", ondelete="CASCADE"),
    )
    op.create_table(
        "job_events",
        sa.Column("id", _SERIAL, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="job_events_pkey"),
    )
    op.create_index("job_events_by_job", "job_events", ["job_id", "id"])
    op.create_table(
        "workers",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("owner", name="workers_pkey"),
    )
    op.create_table(
        "warm",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("owner", "adapter", name="warm_pkey"),
        sa.ForeignKeyConstraint(["owner"], ["workers.owner"], name="warm_owner_fkey", ondelete="CASCADE"),
    )
    op.create_index("warm_by_adapter", "warm", ["adapter"])
    locks = op.create_table(
        "locks",
        sa.Column("name", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="locks_pkey"),
    )
    op.bulk_insert(locks, [{"name": "janitor"}])
