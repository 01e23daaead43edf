"""Housekeeping: lost workers, overdue runs, dead replicas and old jobs."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from cluster.databases.database import open_database
from cluster.jobs.model import JobState, LeaseLost
from cluster.jobs.queue import JobQueue
from cluster.jobs.schema import warm
from tests.cluster.jobs.tables import MODEL, STEP, check_history, claim, let_pass, new_job, state_of, submit


def test_there_may_be_nothing_to_do(queue: JobQueue, url: str) -> None:
    assert queue.sweep() == 0
    waiting, _ = submit(queue, "a", "b")
    claim(queue)
    let_pass(url, 20)
    assert queue.sweep() == 0
    assert queue.depths()[MODEL].running == 1
    assert state_of(queue, waiting.id) is JobState.IN_PROGRESS


def test_a_job_of_a_lost_worker_is_queued_again(queue: JobQueue, url: str) -> None:
    (job,) = submit(queue, "a")
    held = claim(queue)
    queue.record_output(held, 0, {"seed": 1})
    let_pass(url, 31)
    assert queue.sweep() == 1
    assert queue.sweep() == 0
    again = claim(queue, "other")
    assert (again.job.id, again.epoch, again.job.attempts, again.done) == (job.id, 2, 2, {0})


def test_a_renewed_lease_holds(queue: JobQueue, url: str) -> None:
    submit(queue, "a")
    held = claim(queue)
    for _ in range(3):
        let_pass(url, 20)
        queue.heartbeat(held, STEP, renew=True)
        assert queue.sweep() == 0
    let_pass(url, 20)
    queue.heartbeat(held, STEP, renew=False)
    let_pass(url, 20)
    assert queue.sweep() == 1, "progress alone does not renew the lease"


def test_a_lease_that_ended_unseen_can_be_renewed(queue: JobQueue, url: str) -> None:
    """No other worker can claim the job before a sweep, so work continues after a database outage."""
    (job,) = submit(queue, "a")
    held = claim(queue)
    let_pass(url, 300)
    queue.heartbeat(held, STEP, renew=True)
    assert queue.sweep() == 0
    queue.finish(held, JobState.SUCCEEDED, result={})
    assert state_of(queue, job.id) is JobState.SUCCEEDED


def test_a_job_that_loses_every_worker_fails(queue: JobQueue, url: str) -> None:
    (job,) = submit(queue, "a")
    for attempt in (1, 2, 3):
        assert claim(queue, f"replica-{attempt}").job.attempts == attempt
        let_pass(url, 31)
        assert queue.sweep() == 1
    failed = queue.get(job.id)
    assert failed is not None
    assert (failed.state, failed.error_code) == (JobState.FAILED, "WORKER_LOST")
    assert failed.error == "the worker was lost during the job, and all 3 attempts are used up"
    history = queue.events(job.id)
    check_history(history)
    assert [event.owner for event in history[1::2]] == ["replica-1", "replica-2", "replica-3"]


def test_a_run_has_a_time_limit(queue: JobQueue, url: str) -> None:
    (job,) = submit(queue, "a")
    let_pass(url, 10_000)
    held = claim(queue)
    for _ in range(2):
        let_pass(url, 1700)
        assert not queue.heartbeat(held, STEP, renew=True).timed_out
    let_pass(url, 201)
    assert queue.heartbeat(held, STEP, renew=True).timed_out
    assert queue.sweep() == 1
    failed = queue.get(job.id)
    assert failed is not None
    assert (failed.state, failed.error_code) == (JobState.FAILED, "INFERENCE_TIMEOUT")
    assert failed.error == "the job ran longer than the time limit of 3600 s for one run"
    with pytest.raises(LeaseLost):
        queue.heartbeat(held, STEP, renew=True)


def test_the_limit_counts_from_each_start(queue: JobQueue, url: str) -> None:
    submit(queue, "a")
    held = claim(queue)
    let_pass(url, 3000)
    queue.heartbeat(held, STEP, renew=True)
    queue.release(held)
    again = claim(queue)
    let_pass(url, 3000)
    assert not queue.heartbeat(again, STEP, renew=True).timed_out
    assert queue.sweep() == 0


def test_a_worker_lost_long_ago_is_lost_and_not_late(queue: JobQueue, url: str) -> None:
    (job,) = submit(queue, "a")
    claim(queue)
    let_pass(url, 10_000)
    assert queue.sweep() == 1
    assert state_of(queue, job.id) is JobState.IN_QUEUE


def test_a_replica_that_is_gone_is_forgotten(queue: JobQueue, url: str) -> None:
    queue.announce("gone", MODEL, ["a", "b"])
    let_pass(url, 31)
    queue.announce("here", MODEL, ["b"])
    assert queue.depths()[MODEL].workers == 1
    queue.sweep()
    database = open_database(url)
    with database.read() as connection:
        assert connection.execute(select(warm)).all() == [("here", "b")]
    database.close()
    submit(queue, "a", "b")
    assert claim(queue, "new", patience_s=60).job.adapter == "a"
    assert queue.claim(MODEL, "new", warm=["a"], patience_s=60) is None


def test_several_jobs_move_at_once(queue: JobQueue, url: str) -> None:
    jobs = submit(queue, *"abcdef")
    for _ in range(4):
        claim(queue)
    queue.cancel(jobs[0].id)
    let_pass(url, 31)
    assert queue.sweep() == 4
    states = [state_of(queue, job.id) for job in jobs]
    assert states == [JobState.CANCELED, *[JobState.IN_QUEUE] * 5]
    for job in jobs:
        check_history(queue.events(job.id))


class TestRetention:
    def test_only_what_ended_long_enough_ago_has_expired(self, queue: JobQueue, url: str) -> None:
        ended, running, waiting = submit(queue, "a", "b", "c")
        queue.finish(claim(queue), JobState.SUCCEEDED)
        claim(queue)
        let_pass(url, 100)
        (canceled,) = submit(queue, "d")
        queue.cancel(canceled.id)
        assert queue.expired(110) == []
        assert queue.expired(99) == [ended.id]
        assert queue.expired(0) == [ended.id, canceled.id]
        assert queue.expired(0, limit=1) == [ended.id]
        assert state_of(queue, running.id) is JobState.IN_PROGRESS
        assert state_of(queue, waiting.id) is JobState.IN_QUEUE

    def test_nothing_of_a_forgotten_job_is_left(self, queue: JobQueue, url: str) -> None:
        (job,) = queue.submit([new_job(idempotency_key="k", fingerprint="f")])
        (other,) = submit(queue, "other")
        held = claim(queue)
        queue.record_output(held, 0, {"seed": 1})
        queue.finish(held, JobState.SUCCEEDED)
        for _ in range(2):
            assert queue.expired(0) == [job.id], "a read changes nothing, so a crash loses nothing"
        assert queue.forget([job.id, "unknown"]) == 1
        assert queue.get(job.id) is None
        assert (queue.outputs(job.id), queue.events(job.id), queue.expired(0)) == ([], [], [])
        assert queue.forget([job.id]) == 0
        (again,) = queue.submit([new_job(idempotency_key="k", fingerprint="g")])
        assert again.state is JobState.IN_QUEUE
        assert len(queue.events(other.id)) == 1

    def test_a_job_that_is_not_at_its_end_stays(self, queue: JobQueue) -> None:
        running, waiting = submit(queue, "a", "b")
        claim(queue)
        assert queue.forget([running.id, waiting.id]) == 0
        assert queue.forget([]) == 0
        assert [len(queue.events(job.id)) for job in (running, waiting)] == [2, 1]
