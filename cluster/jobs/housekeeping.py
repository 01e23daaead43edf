"""What no worker can do for its jobs: bring back the lost, end those that run too long, forget the old."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, delete, select

from cluster.failures import FailureCode
from cluster.jobs.model import JobState
from cluster.jobs.schema import job_events, jobs, locks, now, workers
from cluster.jobs.transitions import again_or_failed, end_run, literal_state


def sweep(connection: Connection, *, max_attempts: int, run_timeout_s: float, presence_s: float) -> int:
    """Do what is due, in the caller's transaction; return how many jobs moved, 0 if another process is at it.

    A run whose lease has ended is queued again until its attempts are used up; one past its deadline fails;
    both end canceled where the client asked for it. Replicas not seen for `presence_s` seconds are forgotten.
    """
    turn = select(locks.c.name).where(locks.c.name == "janitor").with_for_update(skip_locked=True)
    if connection.scalar(turn) is None:
        return 0
    # Leases first: a run that was lost, and noticed only after its deadline, deserves its next attempt.
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
    """Return the ids of at most `limit` jobs that ended `older_than_s` seconds ago or earlier."""
    old = select(jobs.c.id).where(jobs.c.finished_at <= now() - older_than_s)
    return list(connection.scalars(old.order_by(jobs.c.finished_at).limit(limit)))


def forget(connection: Connection, job_ids: Collection[str]) -> int:
    """Delete those of the jobs that are at their end, with outputs and events; return how many."""
    ended = delete(jobs).where(jobs.c.id.in_(job_ids), jobs.c.finished_at.is_not(None)).returning(jobs.c.id)
    gone = list(connection.scalars(ended))
    connection.execute(delete(job_events).where(job_events.c.job_id.in_(gone)))
    return len(gone)
