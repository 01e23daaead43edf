"""Read-only queries on the table: jobs, their outputs and events, places in the queue, and the load."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select, union_all

from cluster.databases.database import Database
from cluster.jobs.model import Depth, Job, JobEvent, JobState, JobSummary
from cluster.jobs.schema import job_events, job_outputs, jobs, now, workers
from cluster.jobs.transitions import SUMMARY, job_of, summary_of

LIVE = [state for state in JobState if not state.terminal]
"""The states of jobs that have not ended."""


class Reports:
    """Read-only queries on one database. Each raises `StoreUnavailable` if it is unreachable."""

    def __init__(self, database: Database, presence_s: float) -> None:
        """Set the database. A replica counts as alive for `presence_s` seconds after it was last seen."""
        self._database = database
        self._presence_s = presence_s

    # --- One job ---

    def get(self, job_id: str) -> Job | None:
        """Return a job, None if the id is unknown."""
        return self._one(jobs.c.id == job_id)

    def find(self, tenant: str, idempotency_key: str) -> Job | None:
        """Return the tenant's job with this idempotency key, None if there is none."""
        return self._one(and_(jobs.c.tenant == tenant, jobs.c.idempotency_key == idempotency_key))

    def _one(self, condition: ColumnElement[bool]) -> Job | None:
        with self._database.read() as connection:
            row = connection.execute(select(jobs).where(condition)).mappings().one_or_none()
        return None if row is None else job_of(row)

    def outputs(self, job_id: str) -> list[Mapping[str, Any]]:
        """Return the recorded outputs of a job, in the order of its prompts.

        Clients see them once the job has succeeded. Before that, they save a retry from rendering again.
        """
        recorded = select(job_outputs.c.output).where(job_outputs.c.job_id == job_id)
        with self._database.read() as connection:
            return list(connection.scalars(recorded.order_by(job_outputs.c.prompt_index)))

    def events(self, job_id: str) -> list[JobEvent]:
        """Return the history of a job, oldest first."""
        return self.histories([job_id])[job_id]

    def ahead(self, job: Job) -> int | None:
        """Return how many queued jobs of the same model are older, None if this job is not queued.

        This is an approximation: claims prefer loaded LoRAs, so a later job may run earlier.
        """
        if job.state is not JobState.IN_QUEUE:
            return None
        queued = and_(jobs.c.state == JobState.IN_QUEUE, jobs.c.model == job.model)
        before = and_(jobs.c.created_at <= job.created_at, jobs.c.seq < job.seq)
        with self._database.read() as connection:
            return connection.scalars(select(func.count()).where(queued, before)).one()

    # --- Many ---

    def histories(self, job_ids: Collection[str]) -> Mapping[str, list[JobEvent]]:
        """Return the history of each job, oldest event first. Unknown ids get an empty history."""
        found = select(job_events).where(job_events.c.job_id.in_(job_ids)).order_by(job_events.c.id)
        by_job: dict[str, list[JobEvent]] = {job_id: [] for job_id in job_ids}
        with self._database.read() as connection:
            for row in connection.execute(found).mappings():
                by_job[row["job_id"]].append(JobEvent(**{**row, "state": JobState(row["state"])}))
        return by_job

    def latest(self, job_ids: Collection[str]) -> Sequence[tuple[JobSummary, int]]:
        """Return the known jobs, each with the id of its last event, read at the same moment."""
        last = select(func.max(job_events.c.id)).where(job_events.c.job_id == jobs.c.id).scalar_subquery()
        found = select(*SUMMARY, last.label("last")).where(jobs.c.id.in_(job_ids))
        with self._database.read() as connection:
            return [(summary_of(row), row["last"]) for row in connection.execute(found).mappings()]

    def places(self, queued: Collection[JobSummary]) -> Mapping[str, int]:
        """Return `ahead` of all these jobs by id, in a single walk along the index.

        Jobs that are no longer queued are left out.
        """
        ids = {job.seq: job.id for job in queued}
        order = func.row_number().over(partition_by=jobs.c.model, order_by=(jobs.c.created_at, jobs.c.seq))
        alike = and_(jobs.c.state == JobState.IN_QUEUE, jobs.c.model.in_({job.model for job in queued}))
        walk = select(jobs.c.seq, order.label("place")).where(alike).subquery()
        placed = select(walk.c.seq, walk.c.place).where(walk.c.seq.in_(ids))
        with self._database.read() as connection:
            return {ids[seq]: place - 1 for seq, place in connection.execute(placed)}

    def finished(self, job_ids: Collection[str]) -> set[str]:
        """Return which of the jobs have ended or are unknown."""
        return set(job_ids).difference(self._among(job_ids, LIVE))

    def queued(self, job_ids: Collection[str]) -> set[str]:
        """Return which of the jobs are still queued."""
        return self._among(job_ids, [JobState.IN_QUEUE])

    def _among(self, job_ids: Collection[str], states: Collection[JobState]) -> set[str]:
        wanted = select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.state.in_(states))
        with self._database.read() as connection:
            return set(connection.scalars(wanted))

    def list(
        self,
        tenant: str | None,
        *,
        state: JobState | None = None,
        model: str | None = None,
        batch: str | None = None,
        limit: int = 50,
        before: int | None = None,
    ) -> Sequence[JobSummary]:
        """Return at most `limit` jobs with a `seq` below `before`, newest first. Tenant None means all."""
        equal = {jobs.c.tenant: tenant, jobs.c.model: model, jobs.c.batch: batch}
        wanted = select(*SUMMARY).where(
            *(column == value for column, value in equal.items() if value is not None)
        )
        if before is not None:
            wanted = wanted.where(jobs.c.seq < before)
        # Walk the index once per state, because the index sorts by state first.
        walks = [
            wanted.where(jobs.c.state == each).order_by(jobs.c.seq.desc()).limit(limit).subquery()
            for each in ([state] if state else JobState)
        ]
        together = union_all(*(select(walk) for walk in walks))
        newest = together.order_by(together.selected_columns.seq.desc()).limit(limit)
        with self._database.read() as connection:
            return [summary_of(row) for row in connection.execute(newest).mappings()]

    # --- The load ---

    def waiting(self, tenant: str) -> tuple[int, int]:
        """Return how many jobs are queued, of all tenants and of this one. Each count walks one index."""
        queued = select(func.count()).select_from(jobs).where(jobs.c.state == JobState.IN_QUEUE)
        counts = select(queued.scalar_subquery(), queued.where(jobs.c.tenant == tenant).scalar_subquery())
        with self._database.read() as connection:
            total, own = connection.execute(counts).one()
        return total, own

    def depths(self) -> dict[str, Depth]:
        """Return the load of every model with unfinished jobs or live replicas."""
        queued, running = jobs.c.state == JobState.IN_QUEUE, jobs.c.state == JobState.IN_PROGRESS
        oldest_s = now() - func.min(jobs.c.created_at).filter(queued)
        counts = (func.count().filter(queued), func.count().filter(running), func.coalesce(oldest_s, 0.0))
        load = select(jobs.c.model, *counts).where(jobs.c.state.in_(LIVE)).group_by(jobs.c.model)
        present = workers.c.seen_at > now() - self._presence_s
        replicas = select(workers.c.model, func.count()).where(present).group_by(workers.c.model)
        with self._database.read() as connection:
            loads: dict[str, Sequence[Any]] = {model: row for model, *row in connection.execute(load)}
            alive: dict[str, int] = dict(connection.execute(replicas).all())
        found = {}
        for model in loads.keys() | alive.keys():
            waiting, active, age_s = loads.get(model, [0, 0, 0.0])
            found[model] = Depth(queued=waiting, running=active, workers=alive.get(model, 0), oldest_s=age_s)
        return found
