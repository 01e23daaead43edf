"""Housekeeping: requeues lost jobs, fails overdue ones and deletes old ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, delete, select

from cluster.failures import FailureCode
from cluster.jobs.model import JobState
from cluster.jobs.schema import job_events, jobs, locks, now, workers
from cluster.jobs.transitions import again_or_failed, end_run, literal_state


def sweep(connection: Connection, *, max_attempts: int, run_timeout_s: float, presence_s: float) -> int:
    """Requeue lost jobs and fail overdue ones, in the caller's transaction. Return how many jobs moved.

    A job whose lease has expired is queued again, or fails once its attempts are used up. A job past its
    deadline fails. If the client requested cancellation, either is canceled instead. Replicas not seen for
    `presence_s` seconds are deleted. Returns 0 if another process is sweeping.
    """
    turn = select(locks.c.name).where(locks.c.name == "janitor").with_for_update(skip_locked=True)
    if connection.scalar(turn) is None:
        return 0
    # Leases first: a lost run gets its next attempt even if its deadline has passed by now.
    lost = end_run(
        connection,
        again_or_failed(max_attempts),
        jobs.c.lease_until <= now(),
        error=f"the worker was lost during the job, and all {max_attempts} attempts are used up",
        error_code=FailureCode.WORKER_LOST,
    )
    late = end_run(
        connection,
        literal_state(JobState.FAILED),
        jobs.c.deadline <= now(),
        error=f"the job ran longer than the time limit of {run_timeout_s:g} s for one run",
        error_code=FailureCode.INFERENCE_TIMEOUT,
    )
    connection.execute(delete(workers).where(workers.c.seen_at <= now() - presence_s))
    return len(lost) + len(late)


def expired(connection: Connection, older_than_s: float, limit: int) -> Sequence[str]:
    """Return the ids of at most `limit` jobs that ended at least `older_than_s` s ago, oldest first."""
    old = select(jobs.c.id).where(jobs.c.finished_at <= now() - older_than_s)
    return list(connection.scalars(old.order_by(jobs.c.finished_at).limit(limit)))


def forget(connection: Connection, job_ids: Collection[str]) -> int:
    """Delete those of the jobs that have ended, with their outputs and events. Return how many."""
    ended = delete(jobs).where(jobs.c.id.in_(job_ids), jobs.c.finished_at.is_not(None)).returning(jobs.c.id)
    gone = list(connection.scalars(ended))
    connection.execute(delete(job_events).where(job_events.c.job_id.in_(gone)))
    return len(gone)
