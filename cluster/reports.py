"""What the table tells without changing: the load, the place of a job in the queue, a tenant's jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, select, union_all

from cluster.jobs import Depth, Job, JobState, JobSummary
from cluster.schema import jobs, now, workers
from cluster.transitions import SUMMARY, summary_of

LIVE = [state for state in JobState if not state.terminal]
"""The states of jobs that are not at their end."""


def depths(connection: Connection, presence_s: float) -> dict[str, Depth]:
    """Return the load of every model that has live jobs, or replicas seen within `presence_s` seconds."""
    queued, running = jobs.c.state == JobState.IN_QUEUE, jobs.c.state == JobState.IN_PROGRESS
    oldest_s = now() - func.min(jobs.c.created_at).filter(queued)
    counts = (func.count().filter(queued), func.count().filter(running), func.coalesce(oldest_s, 0.0))
    load = select(jobs.c.model, *counts).where(jobs.c.state.in_(LIVE)).group_by(jobs.c.model)
    present = workers.c.seen_at > now() - presence_s
    replicas = select(workers.c.model, func.count()).where(present).group_by(workers.c.model)
    loads: dict[str, list[Any]] = {model: counts for model, *counts in connection.execute(load)}
    alive: dict[str, int] = dict(connection.execute(replicas).all())
    told = {}
    for model in loads.keys() | alive.keys():
        waiting, active, age_s = loads.get(model, [0, 0, 0.0])
        told[model] = Depth(queued=waiting, running=active, workers=alive.get(model, 0), oldest_s=age_s)
    return told


def ahead(connection: Connection, job: Job) -> int:
    """Return how many jobs of its model were queued before this one."""
    queued = and_(jobs.c.state == JobState.IN_QUEUE, jobs.c.model == job.model)
    before = and_(jobs.c.created_at <= job.created_at, jobs.c.seq < job.seq)
    return connection.scalars(select(func.count()).where(queued, before)).one()


def waiting(connection: Connection, tenant: str) -> tuple[int, int]:
    """Return how many jobs are queued, in all and of the tenant; each count walks one index."""
    queued = select(func.count()).select_from(jobs).where(jobs.c.state == JobState.IN_QUEUE)
    counts = select(queued.scalar_subquery(), queued.where(jobs.c.tenant == tenant).scalar_subquery())
    everybody, own = connection.execute(counts).one()
    return everybody, own


def page(
    connection: Connection,
    tenant: str | None,
    *,
    state: JobState | None,
    model: str | None,
    batch: str | None,
    limit: int,
    before: int | None,
) -> Sequence[JobSummary]:
    """Return at most `limit` jobs of the tenant (None: of all), newest first, with a `seq` below `before`.

    Each state is a walk of its own along the index, which has the state before the order.
    """
    wanted = select(*SUMMARY)
    if tenant is not None:
        wanted = wanted.where(jobs.c.tenant == tenant)
    if model is not None:
        wanted = wanted.where(jobs.c.model == model)
    if batch is not None:
        wanted = wanted.where(jobs.c.batch == batch)
    if before is not None:
        wanted = wanted.where(jobs.c.seq < before)
    walks = [
        wanted.where(jobs.c.state == each).order_by(jobs.c.seq.desc()).limit(limit).subquery()
        for each in ([state] if state else JobState)
    ]
    together = union_all(*(select(walk) for walk in walks))
    newest = together.order_by(together.selected_columns.seq.desc()).limit(limit)
    return [summary_of(row) for row in connection.execute(newest).mappings()]
