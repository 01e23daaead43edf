"""Batches: the jobs that a tenant submitted under one name, told of, canceled and retried together.

A batch has no row of its own: it is there while one of its jobs is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select, union_all, update

from cluster.databases.database import Database
from cluster.jobs import submission
from cluster.jobs.model import Job, JobState
from cluster.jobs.schema import job_outputs, jobs
from cluster.jobs.transitions import job_of, literal_state, move

SLICE = 1000
"""Jobs that one transaction changes: it must end within the time that a database gives it."""


class Batches:
    """What the queue of `database` knows of batches; every method raises `StoreUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def counts(self, tenant: str, batch: str) -> dict[JobState, int]:
        """Return how many jobs of the batch are in each state: 0 everywhere where there is no such batch."""
        counted = select(jobs.c.state, func.count()).where(_in(tenant, batch)).group_by(jobs.c.state)
        with self._database.read() as connection:
            found: dict[str, int] = dict(connection.execute(counted).all())
        return {state: found.get(state, 0) for state in JobState}

    def page(self, tenant: str, batch: str, *, after: int, limit: int) -> Sequence[Job]:
        """Return at most `limit` jobs of the batch as submitted, oldest first, with a `seq` above `after`.

        Each state is a walk of its own along the index, which has the state before the order.
        """
        wanted = select(jobs.c.seq).where(_in(tenant, batch), jobs.c.seq > after)
        walks = [
            wanted.where(jobs.c.state == each).order_by(jobs.c.seq).limit(limit).subquery()
            for each in JobState
        ]
        together = union_all(*(select(walk) for walk in walks))
        oldest = together.order_by(together.selected_columns.seq).limit(limit)
        page = select(jobs).where(jobs.c.seq.in_(oldest)).order_by(jobs.c.seq)
        with self._database.read() as connection:
            return [job_of(row) for row in connection.execute(page).mappings()]

    def outputs(self, found: Sequence[Job]) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return the outputs recorded for each of the jobs, by its id, in the order of its prompts."""
        recorded = select(job_outputs.c.job_id, job_outputs.c.output)
        recorded = recorded.where(job_outputs.c.job_id.in_([job.id for job in found]))
        outputs: dict[str, list[Mapping[str, Any]]] = {job.id: [] for job in found}
        with self._database.read() as connection:
            for job_id, output in connection.execute(recorded.order_by(job_outputs.c.prompt_index)):
                outputs[job_id].append(output)
        return outputs

    def stored(self, tenant: str, keys: Sequence[str]) -> list[Job]:
        """Return the tenant's jobs that hold these idempotency keys, in the order of the keys."""
        wanted = select(jobs).where(jobs.c.tenant == tenant, jobs.c.idempotency_key.in_(keys))
        with self._database.read() as connection:
            rows = {row["idempotency_key"]: row for row in connection.execute(wanted).mappings()}
        return [job_of(rows[key]) for key in keys if key in rows]

    def cancel(self, tenant: str, batch: str) -> None:
        """Cancel what is queued of the batch and ask the workers of what runs; what has ended stays."""
        # Before and after: a job may begin, or go back to the queue, in between.
        self._ask_running(tenant, batch)
        queued = select(jobs.c.seq).where(_in(tenant, batch), jobs.c.state == JobState.IN_QUEUE)
        # Locked in one order, so that two of these never wait for one another.
        some = queued.order_by(jobs.c.seq).limit(SLICE).with_for_update()
        while True:
            with self._database.write() as connection:
                chosen = list(connection.scalars(some))
                if not chosen:
                    break
                target = literal_state(JobState.CANCELED)
                move(connection, JobState.IN_QUEUE, target, jobs.c.seq.in_(chosen), cancel_requested=True)
        self._ask_running(tenant, batch)

    def _ask_running(self, tenant: str, batch: str) -> None:
        running = update(jobs).where(_in(tenant, batch), jobs.c.state == JobState.IN_PROGRESS)
        with self._database.write() as connection:
            connection.execute(running.values(cancel_requested=True))

    def retry(self, tenant: str, batch: str, limit: int) -> int:
        """Put new jobs in the place of at most `limit` failed ones, the oldest first; return how many.

        Those that failed stay as they ended, outside of the batch, so each is retried once, whoever asks.
        """
        failed = select(jobs.c.seq).where(_in(tenant, batch), jobs.c.state == JobState.FAILED)
        some = failed.order_by(jobs.c.seq).limit(limit).with_for_update()
        with self._database.write() as connection:
            left = update(jobs).where(jobs.c.seq.in_(list(connection.scalars(some)))).values(batch=None)
            gone = [job_of(row) for row in connection.execute(left.returning(jobs)).mappings()]
            gone.sort(key=lambda job: job.seq)
            return len(submission.store_again(connection, self._database.insert, gone, batch=batch))


def _in(tenant: str, batch: str) -> ColumnElement[bool]:
    return and_(jobs.c.tenant == tenant, jobs.c.batch == batch)
