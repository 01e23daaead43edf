"""What the table tells without changing: the load, places in the queue, how jobs are, a tenant's jobs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, and_, func, select, union_all

from cluster.jobs import Depth, Job, JobEvent, JobState, JobSummary
from cluster.schema import job_events, jobs, now, workers
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


def places(connection: Connection, queued: Collection[JobSummary]) -> dict[str, int]:
    """Return `ahead` by id for all of these jobs in one walk along the index, whatever their number."""
    ids = {job.seq: job.id for job in queued}
    order = func.row_number().over(partition_by=jobs.c.model, order_by=(jobs.c.created_at, jobs.c.seq))
    alike = and_(jobs.c.state == JobState.IN_QUEUE, jobs.c.model.in_({job.model for job in queued}))
    walk = select(jobs.c.seq, order.label("place")).where(alike).subquery()
    found = connection.execute(select(walk.c.seq, walk.c.place).where(walk.c.seq.in_(ids)))
    return {ids[seq]: place - 1 for seq, place in found}


def latest(connection: Connection, job_ids: Collection[str]) -> list[tuple[JobSummary, int]]:
    """Return the known jobs with the id of each one's last event, both as of one moment."""
    last = select(func.max(job_events.c.id)).where(job_events.c.job_id == jobs.c.id).scalar_subquery()
    found = select(*SUMMARY, last.label("last")).where(jobs.c.id.in_(job_ids))
    return [(summary_of(row), row["last"]) for row in connection.execute(found).mappings()]


def histories(connection: Connection, job_ids: Collection[str]) -> dict[str, list[JobEvent]]:
    """Return the events of each job, oldest first."""
    found = select(job_events).where(job_events.c.job_id.in_(job_ids)).order_by(job_events.c.id)
    told: dict[str, list[JobEvent]] = {job_id: [] for job_id in job_ids}
    for row in connection.execute(found).mappings():
        told[row["job_id"]].append(JobEvent(**{**row, "state": JobState(row["state"])}))
    return told


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
