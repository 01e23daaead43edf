"""Batches: counts, pages, cancellation and retry, limited to the tenant's own batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import Engine, event, text

from cluster.databases.database import open_database
from cluster.jobs import batches as batches_module
from cluster.jobs.model import Job, JobState, NewJob, NewWebhook
from cluster.jobs.queue import JobQueue
from tests.cluster.jobs.tables import MODEL, check_history, claim, new_job, state_of

BATCH = "b"


def batch(
    queue: JobQueue, size: int, *, tenant: str = "me", name: str = BATCH, **values: object
) -> list[Job]:
    return queue.submit([replace(new_job(tenant=tenant, batch=name), **values) for _ in range(size)])


def fail(queue: JobQueue) -> str:
    claimed = claim(queue)
    queue.finish(claimed, JobState.FAILED, error="It broke.", error_code="OUT_OF_MEMORY")
    return claimed.job.id


def counts(queue: JobQueue, tenant: str = "me", name: str = BATCH) -> dict[str, int]:
    return {str(state): count for state, count in queue.batches.counts(tenant, name).items() if count}


def test_counts_are_by_state_and_owner(queue: JobQueue) -> None:
    batch(queue, 3)
    batch(queue, 2, tenant="other")
    batch(queue, 2, name="another")
    queue.submit([new_job(tenant="me")])
    fail(queue)
    claim(queue)
    assert counts(queue) == {"in_queue": 1, "in_progress": 1, "failed": 1}
    assert counts(queue, tenant="other") == {"in_queue": 2}
    assert counts(queue, tenant="nobody") == {}


def test_pages_are_in_the_order_of_submission(queue: JobQueue) -> None:
    first, second = batch(queue, 3), batch(queue, 2)
    ids = [job.id for job in first + second]
    one = queue.batches.page("me", BATCH, after=0, limit=2)
    rest = queue.batches.page("me", BATCH, after=one[-1].seq, limit=9)
    assert [job.id for job in (*one, *rest)] == ids
    assert queue.batches.page("other", BATCH, after=0, limit=9) == []
    assert [job.id for job in queue.list("me", batch=BATCH)] == ids[::-1]
    assert queue.list("me", batch="another") == []


def test_outputs_of_many_jobs_come_in_one_read(queue: JobQueue) -> None:
    jobs = batch(queue, 2)
    held = claim(queue)
    for index in (1, 0):
        queue.record_output(held, index, {"n": index})
    assert queue.batches.outputs(jobs) == {jobs[0].id: [{"n": 0}, {"n": 1}], jobs[1].id: []}


@pytest.mark.parametrize("slice_", [2, 1000])
def test_cancel_ends_what_waits_and_asks_what_runs(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, slice_: int
) -> None:
    monkeypatch.setattr(batches_module, "SLICE", slice_)
    batch(queue, 7)
    others = batch(queue, 2, tenant="other")
    failed = fail(queue)
    running = claim(queue)
    queue.batches.cancel("me", BATCH)
    assert counts(queue) == {"failed": 1, "in_progress": 1, "canceled": 5}
    queue.release(running)
    queue.batches.cancel("me", BATCH)
    assert counts(queue) == {"failed": 1, "canceled": 6}
    assert state_of(queue, failed) is JobState.FAILED
    assert {state_of(queue, job.id) for job in others} == {JobState.IN_QUEUE}
    for job in queue.batches.page("me", BATCH, after=0, limit=9):
        check_history(queue.events(job.id))


def test_retry_replaces_what_failed_once(queue: JobQueue) -> None:
    batch(queue, 4)
    failed = [fail(queue) for _ in range(3)]
    assert queue.batches.retry("other", BATCH, 9) == 0
    assert queue.batches.retry("me", BATCH, 2) == 2
    assert counts(queue) == {"in_queue": 3, "failed": 1}
    assert queue.batches.retry("me", BATCH, 9) == 1
    assert queue.batches.retry("me", BATCH, 9) == 0
    assert counts(queue) == {"in_queue": 4}
    retried = queue.batches.page("me", BATCH, after=0, limit=9)
    assert not set(failed) & {job.id for job in retried}
    assert {(job.model, str(job.spec), job.attempts) for job in retried} == {(MODEL, str(new_job().spec), 0)}
    for job_id in failed:
        job = queue.get(job_id)
        assert job is not None
        assert (job.state, job.error, job.batch) == (JobState.FAILED, "It broke.", None)


def test_a_batch_ends_with_its_jobs(queue: JobQueue) -> None:
    jobs = batch(queue, 3)
    queue.batches.cancel("me", BATCH)
    assert queue.forget([job.id for job in jobs]) == 3
    assert counts(queue) == {}


def test_keys_find_what_they_stored_in_their_order(queue: JobQueue) -> None:
    keys = [f"k{index}" for index in range(3)]
    new = [replace(new_job(tenant="me"), idempotency_key=key, fingerprint="f") for key in keys]
    stored = queue.submit(new)
    assert queue.batches.stored("me", keys[::-1]) == stored[::-1]
    assert queue.batches.stored("me", ["k1", "unknown"]) == [stored[1]]
    assert queue.batches.stored("other", keys) == []


def test_webhooks_are_told_of_a_canceled_batch(queue: JobQueue) -> None:
    hook = NewWebhook(url="https://example.org", events=(JobState.CANCELED,))
    stored: list[NewJob] = [new_job(tenant="me", batch=BATCH, webhook=hook) for _ in range(2)]
    queue.submit(stored)
    queue.batches.cancel("me", BATCH)
    assert {message.job.id for message in queue.outbox.take(limit=9)} == {job.id for job in stored}


def test_everything_of_a_batch_is_found_by_its_index(queue: JobQueue, url: str) -> None:
    """The tenant may have any number of other jobs: a service without keys has one tenant."""
    executed: list[tuple[str, object]] = []

    def record(_c: object, _k: object, statement: str, parameters: object, *_: object) -> None:
        executed.append((statement, parameters))

    batch(queue, 3)
    event.listen(Engine, "before_cursor_execute", record)
    queue.batches.counts("me", BATCH)
    queue.batches.page("me", BATCH, after=0, limit=2)
    queue.list("me", batch=BATCH, limit=2)
    queue.batches.cancel("me", BATCH)
    event.remove(Engine, "before_cursor_execute", record)
    chosen = [(statement, values) for statement, values in executed if "jobs.batch =" in statement]
    database = open_database(url)
    with database.write() as connection:
        explain = "EXPLAIN QUERY PLAN"
        if connection.dialect.name == "postgresql":
            # The planner would scan such a small table, whatever its indexes.
            connection.execute(text("SET LOCAL enable_seqscan = off"))
            explain = "EXPLAIN"
        for statement, values in chosen:
            plan = connection.exec_driver_sql(f"{explain} {statement}", values).all()  # type: ignore[arg-type]
            assert "jobs_by_batch" in str(plan) and "jobs_by_tenant" not in str(plan), statement
    assert len(chosen) == 7
    database.close()
