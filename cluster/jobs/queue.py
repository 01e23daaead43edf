"""The job queue: all operations of gateways and workers on the job table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, delete, exists, false, select, update

from cluster.databases.database import Watch, open_database
from cluster.jobs import claims, housekeeping, submission
from cluster.jobs.batches import Batches
from cluster.jobs.group_commit import GroupCommit
from cluster.jobs.migrations import upgrade
from cluster.jobs.model import Claim, Job, JobState, Lease, LeaseLost, NewJob, Progress
from cluster.jobs.reports import Reports
from cluster.jobs.schema import job_outputs, jobs, now, workers
from cluster.jobs.transitions import again_or_failed, cancel, end_run, held_by, literal_state, move
from cluster.jobs.webhook_outbox import Outbox
from cluster.telemetry import redact


class JobQueue(Reports):
    """The durable queue behind one URL, shared by the threads of a process.

    Every write is on disk when its method returns. Every method raises `StoreUnavailable` if the table is
    unreachable. Writes under a claim raise `LeaseLost` and change nothing once the claimed run is over:
    swept, released, claimed again or ended. Until a sweep, an expired lease still belongs to the worker:
    nobody else can get the job, and a late renewal saves the work. Whatever stops a run first takes its job
    out of `in_progress`, so checking state and epoch is enough to reject stale writes.
    """

    def __init__(
        self,
        url: str,
        *,
        lease_s: float = 30.0,
        run_timeout_s: float = 3600.0,
        max_attempts: int = 3,
        age_bound_s: float = 60.0,
    ) -> None:
        """Open the table and bring its schema up to date.

        All times are in seconds. A claim, and a replica's presence, last `lease_s` without renewal. A run may
        take `run_timeout_s`. Jobs older than `age_bound_s` go first. Raises `ValueError` for an unsupported
        URL.
        """
        super().__init__(open_database(url), presence_s=lease_s)
        self._lease_s = lease_s
        self._run_timeout_s = run_timeout_s
        self._max_attempts = max_attempts
        self._age_bound_s = age_bound_s
        self._submissions = GroupCommit(self._database)
        self.outbox = Outbox(self._database)
        self.batches = Batches(self._database)
        with self._database.alone() as connection:
            upgrade(connection)

    def close(self) -> None:
        """Close the connections to the database."""
        self._database.close()

    def watch(self) -> Watch:
        """Return a watch on the whole table, for one thread."""
        return self._database.watch()

    # --- Clients ---

    def submit(self, new: Sequence[NewJob]) -> list[Job]:
        """Store all jobs or none. Return them in order; a known idempotency key returns the earlier job.

        Submissions of several threads share transactions, but each succeeds or fails alone. Raises
        `IdempotencyConflict` if the earlier job has a different fingerprint.
        """
        return self.submit_soon(new).result() if new else []

    def submit_soon(self, new: Sequence[NewJob]) -> Future[list[Job]]:
        """Like `submit`, without waiting. The future ends when the jobs are on disk, or with an error."""
        return self._submissions.submit(new)

    def submit_again(self, failed: Job) -> Job:
        """Store a new job with the spec of a failed one, without batch and secret."""
        with self._database.write() as connection:
            return submission.store_again(connection, self._database.insert, [failed], batch=None)[0]

    def cancel(self, job_id: str) -> tuple[Job, bool] | None:
        """Cancel a queued job, or ask the worker of a running one to stop. None if the id is unknown.

        The second value is False if the job had already ended; it is not changed then.
        """
        with self._database.write() as connection:
            return cancel(connection, job_id)

    # --- Workers ---

    def announce(self, owner: str, model: str, warm: Collection[str]) -> None:
        """Record that a replica is alive and holds `warm` and the adapters of its running jobs."""
        with self._database.write() as connection:
            held = claims.adapters_running(connection, owner) | set(warm)
            claims.announce(connection, self._database.insert, owner, model, held)

    def withdraw(self, owner: str) -> None:
        """Delete a replica and the record of its adapters. Does not change its claims."""
        with self._database.write() as connection:
            connection.execute(delete(workers).where(workers.c.owner == owner))

    def claim(
        self,
        model: str,
        owner: str,
        *,
        warm: Collection[str] = (),
        patience_s: float = 1.0,
        offer: claims.Offer = claims.take_any,
    ) -> Claim | None:
        """Claim the next job for a replica that holds the adapters `warm`. None if there is none now.

        The order is that of `claims.next_job`, and `offer` may refuse jobs. A claim also announces the
        replica with `warm`, the job's adapter and those that `offer` is fetching. Watches do not report jobs
        that become claimable through time alone, after back-off or patience.
        """
        if not self._anything_ready(model):
            return None
        with self._database.write() as connection:
            claims.announce(connection, self._database.insert, owner, model, warm)
            order = {"age_bound_s": self._age_bound_s, "patience_s": patience_s}
            chosen, coming = claims.choose(connection, model, owner, offer, **order)
            if chosen is None and coming <= set(warm):
                # Commit nothing: on SQLite a commit wakes the other replicas, which then wake others.
                connection.rollback()
                return None
            claims.record_held(connection, self._database.insert, owner, coming)
            return None if chosen is None else self._take(connection, owner, chosen)

    def _anything_ready(self, model: str) -> bool:
        """Check without the write lock. Idle replicas poll often and must not queue for it."""
        with self._database.read() as connection:
            return bool(connection.scalar(select(claims.anything_ready(model))))

    def _take(self, connection: Connection, owner: str, seq: int) -> Claim:
        """Claim the job `seq`, which this transaction has locked."""
        (job,) = move(
            connection,
            JobState.IN_QUEUE,
            literal_state(JobState.IN_PROGRESS),
            jobs.c.seq == seq,
            owner=owner,
            epoch=jobs.c.epoch + 1,
            attempts=jobs.c.attempts + 1,
            started_at=now(),
            lease_until=now() + self._lease_s,
            deadline=now() + self._run_timeout_s,
        )
        claims.record_held(connection, self._database.insert, owner, [job.adapter])
        secret, done = claims.secret_and_done(connection, job.id)
        return Claim(job=job, owner=owner, epoch=job.epoch, done=done, secret=secret)

    def peek_next(
        self,
        model: str,
        owner: str,
        *,
        warm: Collection[str],
        patience_s: float,
        without: frozenset[str] = frozenset(),
    ) -> tuple[Job, str | None] | None:
        """Return the job that a busy replica would claim now, and its secret. The job stays in the queue.

        None if the job has not waited `patience_s`: until then it is left to idle replicas. Skips jobs whose
        adapter is in `without`. The job's adapter counts as held from now on, so that not every busy replica
        fetches the same one.
        """
        if not self._anything_ready(model):
            return None
        with self._database.write() as connection:
            claims.announce(connection, self._database.insert, owner, model, warm)
            order = {"age_bound_s": self._age_bound_s, "patience_s": patience_s}
            upcoming = claims.peek_next(connection, model, owner, without=without, **order)
            if upcoming is None or upcoming[0].adapter in warm:
                connection.rollback()
            else:
                claims.record_held(connection, self._database.insert, owner, [upcoming[0].adapter])
        return upcoming

    def heartbeat(self, claim: Claim, progress: Progress, *, renew: bool) -> Lease:
        """Write progress, renew the lease if `renew` is set, and return whether the run must stop."""
        values: dict[str, Any] = {"progress": asdict(progress)}
        if renew:
            values["lease_until"] = now() + self._lease_s
        beat = update(jobs).where(held_by(claim), jobs.c.state == JobState.IN_PROGRESS).values(values)
        returned = beat.returning(jobs.c.cancel_requested, jobs.c.deadline <= now())
        with self._database.write() as connection:
            row = connection.execute(returned).one_or_none()
            if row is None:
                raise _lost(claim)
        return Lease(cancel_requested=row[0], timed_out=row[1])

    def record_output(self, claim: Claim, index: int, output: Mapping[str, Any]) -> None:
        """Record the output of prompt `index`. If one is already recorded, it is kept."""
        row = {"job_id": claim.job.id, "prompt_index": index, "epoch": claim.epoch, "output": dict(output)}
        with self._database.write() as connection:
            held = select(jobs.c.seq).where(held_by(claim), jobs.c.state == JobState.IN_PROGRESS)
            if connection.scalar(held.with_for_update()) is None:
                raise _lost(claim)
            connection.execute(self._database.insert(job_outputs).values(row).on_conflict_do_nothing())

    def finish(
        self,
        claim: Claim,
        state: JobState,
        *,
        error: str | None = None,
        error_code: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """End the job in a terminal state.

        Success is kept even if cancellation was requested: the outputs exist, and the request came too late.
        Finishing again in the same state is no error, because a worker retries a write whose reply was lost.
        """
        if not state.terminal:
            raise ValueError(f"a job cannot finish as {state}")
        values = {"error": error and redact(error), "error_code": error_code, "result": result}
        with self._database.write() as connection:
            if move(connection, JobState.IN_PROGRESS, literal_state(state), held_by(claim), **values):
                return
            if not connection.scalar(select(exists().where(held_by(claim), jobs.c.state == state))):
                raise _lost(claim)

    def retry(self, claim: Claim, *, error: str, error_code: str, delay_s: float) -> JobState:
        """End a failed attempt: queue the job again, claimable after `delay_s` seconds. Return its new state.

        The job fails with the error if its attempts are used up, or is canceled if that was requested.
        """
        target = again_or_failed(self._max_attempts)
        values = {"error": redact(error), "error_code": error_code, "not_before": now() + delay_s}
        with self._database.write() as connection:
            moved = end_run(connection, target, held_by(claim), **values)
            if not moved:
                raise _lost(claim)
        return moved[0].state

    def release(self, claim: Claim) -> None:
        """Put the job back into the queue without counting the attempt, or cancel it if requested."""
        target, attempts = literal_state(JobState.IN_QUEUE), jobs.c.attempts - 1
        with self._database.write() as connection:
            if not end_run(connection, target, held_by(claim), attempts=attempts):
                raise _lost(claim)

    # --- Operation ---

    def check(self) -> None:
        """Raise `StoreUnavailable` unless jobs can be stored now. Changes nothing."""
        # An update of no row needs what a submission needs: the table, a writable server and the write lock.
        with self._database.write() as connection:
            connection.execute(update(jobs).where(false()).values(error=None))

    def sweep(self) -> int:
        """Requeue jobs of lost workers, fail jobs past their deadline, and delete lost replicas.

        Returns how many jobs moved. Every gateway may call it at any time; only one runs at a time.
        """
        with self._database.write() as connection:
            return housekeeping.sweep(
                connection,
                max_attempts=self._max_attempts,
                run_timeout_s=self._run_timeout_s,
                presence_s=self._presence_s,
            )

    def expired(self, older_than_s: float, limit: int = 100) -> Sequence[str]:
        """Return the ids of at most `limit` jobs that ended at least `older_than_s` s ago, oldest first.

        To remove jobs, first delete their objects from the store, then `forget` them. After a crash in
        between, the rows are still there and are found again.
        """
        with self._database.read() as connection:
            return housekeeping.expired(connection, older_than_s, limit)

    def forget(self, job_ids: Collection[str]) -> int:
        """Delete jobs with their outputs, events and idempotency keys. Return how many were deleted.

        Jobs that have not ended are kept.
        """
        with self._database.write() as connection:
            return housekeeping.forget(connection, job_ids)


def _lost(claim: Claim) -> LeaseLost:
    return LeaseLost(f"job {claim.job.id}: {claim.owner} no longer holds it under epoch {claim.epoch}")
