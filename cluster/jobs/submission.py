"""Stores new jobs, only once per idempotency key, and new copies of failed jobs."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, RowMapping, and_, select

from cluster.databases.database import Insert
from cluster.jobs.model import IdempotencyConflict, Job, JobState, NewJob, NewWebhook
from cluster.jobs.schema import jobs, now, webhooks
from cluster.jobs.transitions import job_of, record

_KEY = (jobs.c.tenant, jobs.c.idempotency_key)

_FIELDS = [field.name for field in fields(NewJob) if field.name != "webhook"]


def store(connection: Connection, insert: Insert, new: Sequence[NewJob]) -> list[Job]:
    """Store jobs in the caller's transaction. Return them in order.

    If a job's idempotency key is already stored, returns the earlier job instead. This includes a duplicate
    in a concurrent transaction: the INSERT waits for its commit and then does nothing. Raises
    `IdempotencyConflict` if the earlier job has a different fingerprint; the caller must roll back.
    """
    statement = insert(jobs).values(created_at=now()).on_conflict_do_nothing(index_elements=_KEY)
    connection.execute(statement, [_row(job) for job in new])
    stored = _match(_rows(connection, new), new)
    fresh = [(job, asked) for job, asked in zip(stored, new, strict=True) if job.id == asked.id]
    hooks = [_hook(job.id, asked.webhook) for job, asked in fresh if asked.webhook is not None]
    if hooks:
        connection.execute(insert(webhooks), hooks)
    record(connection, [job for job, _ in fresh])
    return stored


def store_again(
    connection: Connection, insert: Insert, failed: Sequence[Job], *, batch: str | None
) -> list[Job]:
    """Store a new job for each failed one, in the caller's transaction. Return them in order.

    Copies spec, tenant and webhook. The secret was erased when the job failed, so the new job has none.
    """
    asked = select(webhooks).where(webhooks.c.job_id.in_([job.id for job in failed]))
    hooks = {row["job_id"]: _hook_of(row) for row in connection.execute(asked).mappings()}
    new = [
        NewJob(
            id=str(uuid.uuid4()),
            model=job.model,
            spec=job.spec,
            adapter=job.adapter,
            tenant=job.tenant,
            webhook=hooks.get(job.id),
            batch=batch,
        )
        for job in failed
    ]
    return store(connection, insert, new) if new else []


def _hook(job_id: str, hook: NewWebhook) -> dict[str, Any]:
    values = {"url": hook.url, "secret": hook.secret, "events": ",".join(hook.events)}
    return {"job_id": job_id, "attempts": 0, **values}


def _hook_of(row: RowMapping) -> NewWebhook:
    events = tuple(map(JobState, row["events"].split(",")))
    return NewWebhook(url=row["url"], events=events, secret=row["secret"])


def _row(job: NewJob) -> dict[str, Any]:
    empty = {"epoch": 0, "attempts": 0, "not_before": 0.0, "cancel_requested": False}
    return {name: getattr(job, name) for name in _FIELDS} | {"state": JobState.IN_QUEUE} | empty


def _rows(connection: Connection, new: Sequence[NewJob]) -> list[RowMapping]:
    """Return the rows with these ids or keys. One query per condition, so that each uses its index."""
    keys: dict[str, list[str]] = {}
    for job in new:
        if job.idempotency_key is not None:
            keys.setdefault(job.tenant, []).append(job.idempotency_key)
    tenant, key = _KEY
    wanted = [jobs.c.id.in_([job.id for job in new])]
    wanted += [and_(tenant == owner, key.in_(held)) for owner, held in keys.items()]
    return [row for match in wanted for row in connection.execute(select(jobs).where(match)).mappings()]


def _match(rows: Sequence[RowMapping], new: Sequence[NewJob]) -> list[Job]:
    by_id = {row["id"]: row for row in rows}
    by_key = {(row["tenant"], row["idempotency_key"]): row for row in rows}
    stored = []
    for job in new:
        row = by_id[job.id] if job.idempotency_key is None else by_key[job.tenant, job.idempotency_key]
        if row["fingerprint"] != job.fingerprint:
            raise IdempotencyConflict(
                f"the idempotency key {job.idempotency_key!r} was already used for a different request"
            )
        stored.append(job_of(row))
    return stored
