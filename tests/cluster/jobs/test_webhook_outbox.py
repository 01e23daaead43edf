"""The webhook outbox on both databases: due when the job ends, one sender at a time, until delivered."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update

from cluster.databases.database import open_database
from cluster.jobs.model import IdempotencyConflict, Job, JobState, NewWebhook
from cluster.jobs.queue import JobQueue
from cluster.jobs.schema import webhooks
from cluster.jobs.webhook_outbox import DELAYS_S, HOLD_S
from tests.cluster.jobs.tables import claim, let_pass, new_job

ENDS = tuple(state for state in JobState if state.terminal)


def submit(queue: JobQueue, *events: JobState, **values: Any) -> Job:
    hook = NewWebhook(url="https://example.org/hook", events=events or ENDS, secret="ciphertext")
    return queue.submit([new_job(webhook=hook, **values)])[0]


def pass_time(url: str, seconds: float) -> None:
    database = open_database(url)
    with database.write() as connection:
        connection.execute(update(webhooks).values(due_at=webhooks.c.due_at - seconds))
    database.close()


def test_a_message_is_due_with_the_end_of_its_job(queue: JobQueue) -> None:
    job = submit(queue)
    queue.submit([new_job()])
    held = claim(queue)
    assert queue.outbox.take(10) == []
    queue.finish(held, JobState.SUCCEEDED, result={"inference_time": 1.0})
    (message,) = queue.outbox.take(10)
    assert (message.job, message.attempts) == (queue.get(job.id), 1)
    assert (message.url, message.secret) == ("https://example.org/hook", "ciphertext")
    assert "ciphertext" not in repr(message)
    assert queue.outbox.take(10) == [], "another sender has it"
    queue.outbox.delivered(message)
    assert not queue.outbox.take(10)


def test_whoever_ends_the_job(queue: JobQueue, url: str) -> None:
    canceled, lost = submit(queue), submit(queue)
    queue.cancel(canceled.id)
    for _ in range(3):
        assert claim(queue).job.id == lost.id
        let_pass(url, 60)
        queue.sweep()
    messages = sorted(queue.outbox.take(10), key=lambda message: message.sequence)
    assert [message.job.state for message in messages] == [JobState.CANCELED, JobState.FAILED]
    assert messages[0].sequence < messages[1].sequence


def test_only_the_states_asked_for(queue: JobQueue) -> None:
    job = submit(queue, JobState.FAILED)
    queue.cancel(job.id)
    assert queue.outbox.take(10) == []
    assert not queue.outbox.redeliver(job.id)


def test_a_gateway_that_dies_leaves_its_message_to_another(queue: JobQueue, url: str) -> None:
    queue.cancel(submit(queue).id)
    (message,) = queue.outbox.take(10)
    pass_time(url, HOLD_S + 1)
    (again,) = queue.outbox.take(10)
    assert (again.sequence, again.attempts) == (message.sequence, 2)


def test_attempts_back_off_for_a_day_and_then_wait_for_an_operator(queue: JobQueue, url: str) -> None:
    job = submit(queue)
    queue.cancel(job.id)
    for attempt, delay_s in enumerate(DELAYS_S, 1):
        (message,) = queue.outbox.take(10)
        assert message.attempts == attempt
        queue.outbox.refused(message, "the receiver answered 500")
        pass_time(url, delay_s - 1)
        assert queue.outbox.take(10) == []
        pass_time(url, 2)
    (last,) = queue.outbox.take(10)
    queue.outbox.refused(last, "the receiver answered 500")
    pass_time(url, 10 * 86_400)
    assert queue.outbox.take(10) == []
    assert queue.outbox.redeliver(job.id)
    (message,) = queue.outbox.take(10)
    assert message.attempts == 1
    assert not queue.outbox.redeliver("nothing")


def test_a_repeated_submission_has_one_webhook(queue: JobQueue) -> None:
    first = submit(queue, idempotency_key="k", fingerprint="f")
    assert submit(queue, idempotency_key="k", fingerprint="f").id == first.id
    try:
        submit(queue, idempotency_key="k", fingerprint="g")
    except IdempotencyConflict:
        queue.cancel(first.id)
    assert len(queue.outbox.take(10)) == 1


def test_a_job_that_is_submitted_again_has_the_webhook_of_the_first(queue: JobQueue) -> None:
    failed = submit(queue, JobState.FAILED, tenant="me", batch="b")
    queue.finish(claim(queue), JobState.FAILED, error="no", error_code="X")
    again = queue.submit_again(failed)
    assert (again.state, again.spec, again.tenant, again.batch) == (
        JobState.IN_QUEUE,
        failed.spec,
        "me",
        None,
    )
    assert queue.batches.retry("me", "b", 9) == 1
    other = claim(queue), claim(queue)
    for held in other:
        queue.finish(held, JobState.FAILED, error="no", error_code="X")
    messages = queue.outbox.take(10)
    assert {message.job.id for message in messages} == {failed.id, *(held.job.id for held in other)}
    assert {(message.url, message.secret) for message in messages} == {
        ("https://example.org/hook", "ciphertext")
    }


def test_what_is_forgotten_is_told_nobody(queue: JobQueue) -> None:
    job = submit(queue)
    queue.cancel(job.id)
    assert queue.forget([job.id]) == 1
    assert queue.outbox.take(10) == []
