"""The tables of the job queue, and the database clock for all their times."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class now(FunctionElement[float]):
    """Seconds since the epoch on the database's clock, to the millisecond. Constant for all rows."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(_element: now, _compiler: SQLCompiler, **_options: Any) -> str:  # noqa: ANN401
    # unixepoch('now', 'subsec') is NULL before SQLite 3.42. 2440587.5 is the epoch's Julian day.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(_element: now, _compiler: SQLCompiler, **_options: Any) -> str:  # noqa: ANN401
    # A subquery is evaluated once. Without it no index is used, because clock_timestamp() is volatile.
    return "(SELECT extract(epoch FROM clock_timestamp())::double precision)"


_Serial = BigInteger().with_variant(Integer, "sqlite")
"""SQLite generates primary keys only if their type is INTEGER."""

_Object = JSON(none_as_null=True)

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("seq", _Serial, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("spec", _Object, nullable=False),
    Column("adapter", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("fingerprint", Text),
    Column("state", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    # The replica of the last claim. It holds the job only while the state is in_progress.
    Column("owner", Text),
    Column("lease_until", Double),
    Column("deadline", Double),
    Column("not_before", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("cancel_requested", Boolean, nullable=False),
    Column("progress", _Object),
    Column("error", Text),
    Column("error_code", Text),
    Column("result", _Object),
    # Ciphertext for the job's worker. Erased when the job ends.
    Column("secret", Text),
    # Name of the batch, if the job belongs to one.
    Column("batch", Text),
    UniqueConstraint("tenant", "idempotency_key"),
    # Oldest job first, by model or by LoRA. The first index also serves depths and expired leases.
    Index("jobs_by_age", "state", "model", "created_at", "seq"),
    Index("jobs_by_adapter", "state", "model", "adapter", "created_at", "seq"),
    Index("jobs_by_tenant", "tenant", "state", "seq"),
    Index("jobs_by_end", "finished_at"),
    # Covers the counts of a batch. Partial, because most jobs have no batch.
    Index(
        "jobs_by_batch",
        "tenant",
        "batch",
        "state",
        "seq",
        sqlite_where=text("batch IS NOT NULL"),
        postgresql_where=text("batch IS NOT NULL"),
    ),
)

job_outputs = Table(
    "job_outputs",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("prompt_index", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("output", _Object, nullable=False),
)

# Append-only until the job is deleted. No foreign key, because it would be checked at every state change.
job_events = Table(
    "job_events",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("job_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("owner", Text),
    Column("at", Double, nullable=False),
    Index("job_events_by_job", "job_id", "id"),
)

# One row per job with a webhook. It is due from the job's end until it is delivered.
webhooks = Table(
    "webhooks",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("url", Text, nullable=False),
    # The URL's query, encrypted.
    Column("secret", Text),
    # Terminal states, separated by commas.
    Column("events", Text, nullable=False),
    Column("due_at", Double),
    Column("attempts", Integer, nullable=False),
    Column("delivered_at", Double),
    Column("error", Text),
    Index("webhooks_by_due", "due_at"),
)

workers = Table(
    "workers",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("seen_at", Double, nullable=False),
)

warm = Table(
    "warm",
    metadata,
    Column("owner", Text, ForeignKey("workers.owner", ondelete="CASCADE"), primary_key=True),
    Column("adapter", Text, primary_key=True),
    Index("warm_by_adapter", "adapter"),
)

# One row per task that only one process may run at a time. The process locks the row meanwhile.
locks = Table("locks", metadata, Column("name", Text, primary_key=True))
