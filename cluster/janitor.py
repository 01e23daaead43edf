"""What no worker can do for its jobs: bring back those of lost workers, and end those that run too long."""

from __future__ import annotations

from sqlalchemy import Connection, delete, select

from cluster.jobs import FailureCode, JobState
from cluster.schema import jobs, locks, now, workers
from cluster.transitions import again_or_failed, end_run, literal_state


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
