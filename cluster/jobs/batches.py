"""Batches: reports on, cancels and retries all jobs that a tenant submitted under one batch name.

A batch has no row. It exists as long as one of its jobs does.
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
"""Maximum jobs changed per transaction, which must end within the database's time limit."""


class Batches:
    """The batches in `database`. Every method raises `StoreUnavailable` if it is unreachable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def counts(self, tenant: str, batch: str) -> dict[JobState, int]:
        """Return the number of the batch's jobs in each state. All are 0 if there is no such batch."""
        counted = select(jobs.c.state, func.count()).where(_in(tenant, batch)).group_by(jobs.c.state)
        with self._database.read() as connection:
            found: dict[str, int] = dict(connection.execute(counted).all())
        return {state: found.get(state, 0) for state in JobState}

    def page(self, tenant: str, batch: str, *, after: int, limit: int) -> Sequence[Job]:
        """Return at most `limit` jobs of the batch with a `seq` above `after`, in order of submission.

        Walks the index once per state, because the index sorts by state first.
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
        """Return the recorded outputs of each job by job id, in the order of its prompts."""
        recorded = select(job_outputs.c.job_id, job_outputs.c.output)
        recorded = recorded.where(job_outputs.c.job_id.in_([job.id for job in found]))
        outputs: dict[str, list[Mapping[str, Any]]] = {job.id: [] for job in found}
        with self._database.read() as connection:
            for job_id, output in connection.execute(recorded.order_by(job_outputs.c.prompt_index)):
                outputs[job_id].append(output)
        return outputs

    def stored(self, tenant: str, keys: Sequence[str]) -> list[Job]:
        """Return the tenant's jobs with these idempotency keys, in the order of the keys."""
        wanted = select(jobs).where(jobs.c.tenant == tenant, jobs.c.idempotency_key.in_(keys))
        with self._database.read() as connection:
            rows = {row["idempotency_key"]: row for row in connection.execute(wanted).mappings()}
        return [job_of(rows[key]) for key in keys if key in rows]

    def cancel(self, tenant: str, batch: str) -> None:
        """Cancel the queued jobs of the batch, and ask workers to stop its running jobs."""
        # Before and after, because a job may start, or go back to the queue, in between.
        self._ask_running(tenant, batch)
        queued = select(jobs.c.seq).where(_in(tenant, batch), jobs.c.state == JobState.IN_QUEUE)
        # Always lock in the same order, so that two calls cannot deadlock.
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
        """Replace at most `limit` failed jobs by new ones, oldest first. Return how many.

        The failed jobs stay in the table but leave the batch, so concurrent calls retry each only once.
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
