"""State changes of jobs. Each is one UPDATE that names the old state, plus an event in the history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Text,
    and_,
    case,
    insert,
    literal,
    null,
    select,
    update,
)

from cluster.databases.database import notify_watches
from cluster.jobs.model import Claim, Job, JobState, JobSummary, Phase, Progress
from cluster.jobs.schema import job_events, jobs, now, webhooks

_TERMINAL = [state for state in JobState if state.terminal]

SUMMARY = [jobs.c[field.name] for field in fields(JobSummary)]
"""The columns of a `JobSummary`. Leaves out the spec, which may have megabytes."""


def job_of(row: RowMapping) -> Job:
    """Build a job from a row of the table."""
    return Job(**_values(row, Job))


def summary_of(row: RowMapping) -> JobSummary:
    """Build a summary from the `SUMMARY` columns of a row."""
    return JobSummary(**_values(row, JobSummary))


def _values(row: RowMapping, kind: type[JobSummary]) -> dict[str, Any]:
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(kind)}
    values["state"] = JobState(row["state"])
    if row["progress"] is not None:
        values["progress"] = Progress(**row["progress"] | {"phase": Phase(row["progress"]["phase"])})
    return values


def held_by(claim: Claim) -> ColumnElement[bool]:
    """Match the job of a claim unless it was claimed again. Epochs only grow."""
    return and_(jobs.c.id == claim.job.id, jobs.c.owner == claim.owner, jobs.c.epoch == claim.epoch)


def literal_state(state: JobState) -> ColumnElement[str]:
    """Return a state as an SQL literal of the column's type."""
    return literal(state, Text)


def move(
    connection: Connection,
    source: JobState,
    target: ColumnElement[str],
    *where: ColumnElement[bool],
    **values: Any,  # noqa: ANN401 - column values and expressions
) -> Sequence[Job]:
    """Move the matching jobs from state `source` to `target` and record events. Return the updated jobs.

    `target` is an expression over the row. Clears lease and deadline unless `values` sets them. A job that
    ends also gets `finished_at`, and its secret is erased. Jobs that do not match, or are no longer in
    `source`, are not changed and not returned.
    """
    ended = target.in_(_TERMINAL)
    changes = {
        "state": target,
        "finished_at": case((ended, now())),
        "secret": case((ended, null()), else_=jobs.c.secret),
        "lease_until": None,
        "deadline": None,
    }
    statement = update(jobs).where(jobs.c.state == source, *where).values(changes | values).returning(jobs)
    moved = [job_of(row) for row in connection.execute(statement).mappings()]
    record(connection, moved)
    return moved


def record(connection: Connection, changed: Sequence[Job]) -> None:
    """Append an event for each job whose state has just changed. If a job has ended, its webhook becomes due.

    The commit wakes all watches if a job was queued or has ended, but not for claims: no watch needs them,
    and PostgreSQL serializes commits that notify.
    """
    events = [
        {"job_id": job.id, "state": job.state, "epoch": job.epoch, "owner": job.owner} for job in changed
    ]
    if events:
        connection.execute(insert(job_events).values(at=now()), events)
        for state in _TERMINAL:
            if ended := [job.id for job in changed if job.state is state]:
                wanted = and_(webhooks.c.job_id.in_(ended), webhooks.c.events.contains(state))
                connection.execute(update(webhooks).where(wanted).values(due_at=now()))
        if any(job.state is not JobState.IN_PROGRESS for job in changed):
            notify_watches(connection)


def end_run(
    connection: Connection,
    target: ColumnElement[str],
    *where: ColumnElement[bool],
    error: str | None = None,
    error_code: str | None = None,
    **values: Any,  # noqa: ANN401 - column values and expressions
) -> Sequence[Job]:
    """End runs without a result. A job becomes canceled if the client requested it, else moves to `target`.

    Only a job that fails keeps the error. A job that is queued again loses its start time and progress.
    """
    state = case((jobs.c.cancel_requested, literal_state(JobState.CANCELED)), else_=target)
    failed, queued = state == JobState.FAILED, state == JobState.IN_QUEUE
    changes: dict[str, Any] = {
        "error": case((failed, literal(error, Text))),
        "error_code": case((failed, literal(error_code, Text))),
        "started_at": case((queued, null()), else_=jobs.c.started_at),
        "progress": case((queued, null()), else_=jobs.c.progress),
    }
    return move(connection, JobState.IN_PROGRESS, state, *where, **changes | values)


def again_or_failed(max_attempts: int) -> ColumnElement[str]:
    """Return the state after a retryable failure: queued, or failed once all attempts are used up."""
    used_up = jobs.c.attempts >= max_attempts
    return case((used_up, literal_state(JobState.FAILED)), else_=literal_state(JobState.IN_QUEUE))


def cancel(connection: Connection, job_id: str) -> tuple[Job, bool] | None:
    """Cancel a queued job, or ask the worker of a running one to stop. See `JobQueue.cancel`."""
    found = select(jobs).where(jobs.c.id == job_id).with_for_update()
    row = connection.execute(found).mappings().one_or_none()
    if row is None:
        return None
    if row["state"] == JobState.IN_QUEUE:
        target = literal_state(JobState.CANCELED)
        (job,) = move(connection, JobState.IN_QUEUE, target, jobs.c.id == job_id, cancel_requested=True)
        return job, True
    if row["state"] == JobState.IN_PROGRESS:
        request = update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True).returning(jobs)
        return job_of(connection.execute(request).mappings().one()), True
    return job_of(row), False
