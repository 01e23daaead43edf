"""The queue against a model: random operations of several workers, including ones that lost their lease."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from cluster.jobs.model import Claim, IdempotencyConflict, JobState, LeaseLost
from cluster.jobs.queue import JobQueue
from tests.cluster.jobs.tables import MODEL, STEP, check_history, empty, let_pass, new_job

LEASE_S, RUN_S, ATTEMPTS = 30.0, 100.0, 3

OWNERS = ("replica-1", "replica-2", "replica-3")


@dataclass
class Expected:
    """The model's state of a job; times are the seconds left."""

    state: JobState = JobState.IN_QUEUE
    epoch: int = 0
    attempts: int = 0
    owner: str | None = None
    cancel: bool = False
    lease: float = 0.0
    run: float = 0.0
    back_off: float = 0.0
    outputs: dict[int, str] = field(default_factory=dict)
    forgotten: bool = False

    def stop(self, target: JobState) -> None:
        """End a run that has no result."""
        self.state = JobState.CANCELED if self.cancel else target

    def again(self) -> JobState:
        return JobState.IN_QUEUE if self.attempts < ATTEMPTS else JobState.FAILED


class QueueMachine(RuleBasedStateMachine):
    """Rules are the queue's methods; invariants compare it with the model."""

    claims = Bundle("claims")
    ids = Bundle("ids")

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.queue = JobQueue(self.url, lease_s=LEASE_S, run_timeout_s=RUN_S, max_attempts=ATTEMPTS)
        self.model: dict[str, Expected] = {}
        self.keys: dict[str, tuple[str, str]] = {}

    def teardown(self) -> None:
        for job_id, job in self.model.items():
            events = self.queue.events(job_id)
            if job.forgotten:
                assert not events
                continue
            check_history(events)
            assert [event.state.terminal for event in events[:-1]] == [False] * (len(events) - 1)
            assert (events[-1].state, events[-1].epoch) == (job.state, job.epoch)
        self.queue.close()
        empty(self.url)

    def held(self, claim: Claim) -> Expected | None:
        """Return the model of the claimed job if the claim still holds it."""
        job = self.model[claim.job.id]
        holds = (job.state, job.epoch, job.owner) == (JobState.IN_PROGRESS, claim.epoch, claim.owner)
        return job if holds else None

    def write(self, claim: Claim, write: Callable[[], object]) -> Expected | None:
        """Write under a claim; it must be refused if and only if the model says that the claim is over."""
        job = self.held(claim)
        if job is None:
            with pytest.raises(LeaseLost):
                write()
        else:
            write()
        return job

    @rule(target=ids, adapters=st.lists(st.sampled_from("ab"), min_size=1, max_size=3))
    def submit(self, adapters: list[str]) -> object:
        jobs = self.queue.submit([new_job(adapter) for adapter in adapters])
        self.model |= {job.id: Expected() for job in jobs}
        return multiple(*(job.id for job in jobs))

    @rule(target=ids, key=st.sampled_from("kl"), fingerprint=st.sampled_from("xy"))
    def submit_with_key(self, key: str, fingerprint: str) -> object:
        new = new_job("a", idempotency_key=key, fingerprint=fingerprint)
        known = self.keys.setdefault(key, (new.id, fingerprint))
        if known[1] != fingerprint:
            with pytest.raises(IdempotencyConflict):
                self.queue.submit([new])
            return multiple()
        assert self.queue.submit([new])[0].id == known[0]
        self.model.setdefault(known[0], Expected())
        return known[0]

    @rule(target=claims, owner=st.sampled_from(OWNERS), warm=st.sets(st.sampled_from("abc")))
    def claim(self, owner: str, warm: set[str]) -> object:
        claim = self.queue.claim(MODEL, owner, warm=warm, patience_s=0)
        ready = [job for job in self.model.values() if job.state is JobState.IN_QUEUE and job.back_off <= 0]
        assert (claim is not None) == bool(ready)
        if claim is None:
            return multiple()
        job = self.model[claim.job.id]
        assert any(job is candidate for candidate in ready)
        assert claim.done == set(job.outputs)
        job.state, job.owner, job.lease, job.run = JobState.IN_PROGRESS, owner, LEASE_S, RUN_S
        job.epoch, job.attempts = job.epoch + 1, job.attempts + 1
        return claim

    @rule(claim=claims, renew=st.booleans())
    def heartbeat(self, claim: Claim, renew: bool) -> None:
        job = self.held(claim)
        if job is None:
            with pytest.raises(LeaseLost):
                self.queue.heartbeat(claim, STEP, renew=renew)
            return
        lease = self.queue.heartbeat(claim, STEP, renew=renew)
        assert (lease.cancel_requested, lease.timed_out) == (job.cancel, job.run <= 0)
        if renew:
            job.lease = LEASE_S

    @rule(claim=claims, index=st.integers(0, 2))
    def record_output(self, claim: Claim, index: int) -> None:
        by = f"{claim.owner}/{claim.epoch}"
        if job := self.write(claim, lambda: self.queue.record_output(claim, index, {"by": by})):
            job.outputs.setdefault(index, by)

    @rule(claim=claims, state=st.sampled_from([state for state in JobState if state.terminal]))
    def finish(self, claim: Claim, state: JobState) -> None:
        job = self.model[claim.job.id]
        repeated = (job.state, job.epoch, job.owner) == (state, claim.epoch, claim.owner)
        if repeated and not job.forgotten:
            self.queue.finish(claim, state)
        elif self.write(claim, lambda: self.queue.finish(claim, state)):
            job.state = state

    @rule(claim=claims, delay_s=st.sampled_from([0, 50]))
    def retry(self, claim: Claim, delay_s: float) -> None:
        failure = {"error": "e", "error_code": "E", "delay_s": delay_s}
        if job := self.write(claim, lambda: self.queue.retry(claim, **failure)):
            job.stop(job.again())
            job.back_off = delay_s

    @rule(claim=consumes(claims))
    def release(self, claim: Claim) -> None:
        if job := self.write(claim, lambda: self.queue.release(claim)):
            job.attempts -= 1
            job.back_off = 0
            job.stop(JobState.IN_QUEUE)

    @rule(job_id=ids)
    def cancel(self, job_id: str) -> None:
        job = self.model[job_id]
        answer = self.queue.cancel(job_id)
        assert (answer is None) is job.forgotten
        if answer is None:
            return
        assert answer[1] is not job.state.terminal
        if not job.state.terminal:
            job.cancel = True
        if job.state is JobState.IN_QUEUE:
            job.state = JobState.CANCELED

    @rule(job_id=ids)
    def forget(self, job_id: str) -> None:
        job = self.model[job_id]
        going = job.state.terminal and not job.forgotten
        assert self.queue.forget([job_id]) == going
        if going:
            job.forgotten = True
            job.outputs.clear()
            self.keys = {key: held for key, held in self.keys.items() if held[0] != job_id}

    @rule(seconds=st.sampled_from([20, 60]))
    def let_pass(self, seconds: float) -> None:
        let_pass(self.url, seconds)
        for job in self.model.values():
            job.lease, job.run, job.back_off = job.lease - seconds, job.run - seconds, job.back_off - seconds

    @rule()
    def sweep(self) -> None:
        running = [job for job in self.model.values() if job.state is JobState.IN_PROGRESS]
        due = [job for job in running if job.lease <= 0 or job.run <= 0]
        assert self.queue.sweep() == len(due)
        for job in due:
            job.back_off = 0
            job.stop(job.again() if job.lease <= 0 else JobState.FAILED)

    @invariant()
    def the_table_is_as_the_model(self) -> None:
        for job_id, job in self.model.items():
            row = self.queue.get(job_id)
            assert (row is None) is job.forgotten
            if row is None:
                continue
            assert (row.state, row.epoch, row.attempts, row.owner, row.cancel_requested) == (
                job.state,
                job.epoch,
                job.attempts,
                job.owner,
                job.cancel,
            )
            assert (row.finished_at is not None) is job.state.terminal
            assert self.queue.outputs(job_id) == [{"by": by} for _, by in sorted(job.outputs.items())]
        ended = {job_id for job_id, job in self.model.items() if job.state.terminal}
        assert self.queue.finished(self.model) == ended


def test_the_queue_does_what_the_model_says(url: str) -> None:
    class Machine(QueueMachine):
        def __init__(self) -> None:
            super().__init__(url)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=30,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
