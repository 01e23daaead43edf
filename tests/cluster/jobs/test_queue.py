"""The life of a job: every transition, every refused operation, and which worker may write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, StatementError

from cluster.databases.database import open_database
from cluster.jobs.model import (
    Claim,
    IdempotencyConflict,
    Job,
    JobState,
    JobSummary,
    LeaseLost,
    NewJob,
    Phase,
    Progress,
)
from cluster.jobs.queue import JobQueue
from cluster.jobs.schema import jobs
from tests.cluster.jobs.tables import STEP, check_history, claim, let_pass, new_job, state_of, submit

Write = Callable[[JobQueue, Claim], object]

FENCED: dict[str, Write] = {
    "heartbeat": lambda queue, held: queue.heartbeat(held, STEP, renew=False),
    "renew": lambda queue, held: queue.heartbeat(held, STEP, renew=True),
    "output": lambda queue, held: queue.record_output(held, 0, {"late": True}),
    "succeed": lambda queue, held: queue.finish(held, JobState.SUCCEEDED, result={"late": True}),
    "fail": lambda queue, held: queue.finish(held, JobState.FAILED, error="e", error_code="E"),
    "retry": lambda queue, held: queue.retry(held, error="e", error_code="E", delay_s=0),
    "release": lambda queue, held: queue.release(held),
}

ENDS: dict[str, Write] = {
    "release": FENCED["release"],
    "retry": FENCED["retry"],
    "cancel": lambda queue, held: queue.finish(held, JobState.CANCELED),
    "succeed": lambda queue, held: queue.finish(held, JobState.SUCCEEDED, result={"first": True}),
}


def secret_of(url: str, job_id: str) -> str | None:
    database = open_database(url)
    with database.read() as connection:
        secret = connection.scalar(select(jobs.c.secret).where(jobs.c.id == job_id))
    database.close()
    return secret


def test_a_job_runs_to_success(queue: JobQueue) -> None:
    (job,) = submit(queue, "lora")
    assert (job.state, job.epoch, job.attempts, job.owner) == (JobState.IN_QUEUE, 0, 0, None)
    held = claim(queue, "replica-1")
    assert (held.job.state, held.epoch, held.job.attempts) == (JobState.IN_PROGRESS, 1, 1)
    assert held.job.spec == {"prompts": ["a cat"]}
    assert held.job.started_at is not None
    lease = queue.heartbeat(held, STEP, renew=True)
    assert not lease.cancel_requested
    assert not lease.timed_out
    running = queue.get(job.id)
    assert running is not None
    assert running.progress == STEP
    queue.record_output(held, 1, {"seed": 43})
    queue.record_output(held, 0, {"seed": 42})
    queue.finish(held, JobState.SUCCEEDED, result={"inference_time": 1.5})
    done = queue.get(job.id)
    assert done is not None
    assert (done.state, done.result, done.error) == (JobState.SUCCEEDED, {"inference_time": 1.5}, None)
    assert done.finished_at is not None
    assert done.created_at <= held.job.started_at <= done.finished_at
    assert queue.outputs(job.id) == [{"seed": 42}, {"seed": 43}]
    history = queue.events(job.id)
    check_history(history)
    assert [(event.state, event.owner) for event in history] == [
        (JobState.IN_QUEUE, None),
        (JobState.IN_PROGRESS, "replica-1"),
        (JobState.SUCCEEDED, "replica-1"),
    ]


def test_a_job_is_its_text(queue: JobQueue) -> None:
    spec = {"prompt": "é 漢字 😀 \u202e \x00 \ud800 \" ' \\", "seed": 2**63, "guidance": 3.5, "none": None}
    (job,) = queue.submit([NewJob(id="1", model="flux", spec=spec, adapter="ü/'x'.safetensors", tenant="t")])
    assert (job.spec, job.adapter, job.tenant) == (spec, "ü/'x'.safetensors", "t")
    assert claim(queue).job.spec == spec


def test_what_is_no_json_is_refused(queue: JobQueue) -> None:
    with pytest.raises((StatementError, ValueError), match="JSON compliant"):
        queue.submit([new_job(), NewJob(id="2", model="flux", spec={"x": float("nan")}, adapter="")])
    assert queue.depths() == {}


def test_a_job_that_nobody_knows(queue: JobQueue) -> None:
    assert queue.get("no-such-job") is None
    assert queue.find("", "no-such-key") is None
    assert queue.cancel("no-such-job") is None
    assert queue.outputs("no-such-job") == []
    assert queue.events("no-such-job") == []
    assert queue.submit([]) == []


@pytest.mark.parametrize("write", FENCED.values(), ids=FENCED)
def test_a_late_writer_is_refused_after_another_claim(queue: JobQueue, url: str, write: Write) -> None:
    (job,) = submit(queue, "lora")
    zombie = claim(queue, "zombie")
    let_pass(url, 31)
    assert queue.sweep() == 1
    held = claim(queue, "other")
    with pytest.raises(LeaseLost):
        write(queue, zombie)
    assert queue.outputs(job.id) == []
    queue.finish(held, JobState.SUCCEEDED, result={"by": "other"})
    with pytest.raises(LeaseLost):
        FENCED["heartbeat"](queue, zombie)
    done = queue.get(job.id)
    assert done is not None
    assert done.result == {"by": "other"}
    check_history(queue.events(job.id))


@pytest.mark.parametrize("write", FENCED.values(), ids=FENCED)
def test_the_same_replica_is_refused_under_its_earlier_epoch(queue: JobQueue, write: Write) -> None:
    submit(queue, "lora")
    first = claim(queue, "replica")
    queue.release(first)
    second = claim(queue, "replica")
    assert second.epoch == 2
    with pytest.raises(LeaseLost):
        write(queue, first)
    assert state_of(queue, second.job.id) is JobState.IN_PROGRESS


# Repeating a success is no error: see the test of lost replies.
AFTER = [(end, write) for end in ENDS for write in FENCED if (end, write) != ("succeed", "succeed")]


@pytest.mark.parametrize(("end", "write"), AFTER)
def test_nothing_is_written_after_a_run(queue: JobQueue, end: str, write: str) -> None:
    (job,) = submit(queue, "lora")
    held = claim(queue)
    ENDS[end](queue, held)
    before = queue.get(job.id)
    with pytest.raises(LeaseLost):
        FENCED[write](queue, held)
    assert queue.get(job.id) == before
    check_history(queue.events(job.id))


def test_a_write_whose_reply_was_lost_may_be_repeated(queue: JobQueue) -> None:
    (job,) = submit(queue, "lora")
    held = claim(queue)
    queue.record_output(held, 0, {"key": "first"})
    queue.record_output(held, 0, {"key": "second"})
    queue.finish(held, JobState.SUCCEEDED, result={"n": 1})
    queue.finish(held, JobState.SUCCEEDED, result={"n": 2})
    done = queue.get(job.id)
    assert done is not None
    assert done.result == {"n": 1}
    assert queue.outputs(job.id) == [{"key": "first"}]
    assert len(queue.events(job.id)) == 3


@pytest.mark.parametrize("forged", [{"owner": "another"}, {"epoch": 2}, {"epoch": 0}])
def test_a_claim_is_owner_and_epoch(queue: JobQueue, forged: dict[str, str]) -> None:
    submit(queue, "lora")
    with pytest.raises(LeaseLost):
        queue.finish(replace(claim(queue), **forged), JobState.SUCCEEDED)


@pytest.mark.parametrize("state", [JobState.IN_QUEUE, JobState.IN_PROGRESS])
def test_a_job_ends_only_in_a_terminal_state(queue: JobQueue, state: JobState) -> None:
    submit(queue, "lora")
    held = claim(queue)
    with pytest.raises(ValueError, match="cannot finish"):
        queue.finish(held, state)


def test_a_failed_attempt_is_repeated_after_its_delay_with_what_is_done(queue: JobQueue, url: str) -> None:
    (job,) = submit(queue, "lora")
    held = claim(queue)
    assert held.done == frozenset()
    queue.record_output(held, 1, {"seed": 1})
    queue.heartbeat(held, STEP, renew=False)
    assert queue.retry(held, error="device fault", error_code="DEVICE_FAULT", delay_s=20) is JobState.IN_QUEUE
    waiting = queue.get(job.id)
    assert waiting is not None
    assert (waiting.error, waiting.error_code, waiting.started_at, waiting.progress) == (None,) * 4
    assert queue.claim("flux", "replica") is None
    let_pass(url, 15)
    assert queue.claim("flux", "replica") is None
    let_pass(url, 10)
    again = claim(queue)
    assert (again.epoch, again.job.attempts, again.done) == (2, 2, {1})


def test_the_last_attempt_fails_with_its_own_error(queue: JobQueue) -> None:
    (job,) = submit(queue, "lora")
    for attempt in (1, 2):
        assert queue.retry(claim(queue), error=f"{attempt}", error_code="E", delay_s=0) is JobState.IN_QUEUE
    last = claim(queue)
    assert (
        queue.retry(last, error="disk\nfull", error_code="OUTPUT_STORE_ERROR", delay_s=9) is JobState.FAILED
    )
    failed = queue.get(job.id)
    assert failed is not None
    assert (failed.error, failed.error_code) == ("disk\\nfull", "OUTPUT_STORE_ERROR")
    assert failed.finished_at is not None
    assert queue.claim("flux", "replica") is None
    check_history(queue.events(job.id))


def test_a_release_does_not_count(queue: JobQueue) -> None:
    (job,) = submit(queue, "lora")
    for epoch in range(1, 6):
        held = claim(queue)
        assert (held.epoch, held.job.attempts) == (epoch, 1)
        queue.release(held)
    check_history(queue.events(job.id))


def test_secrets_of_an_error_are_not_stored(queue: JobQueue) -> None:
    (job,) = submit(queue, "lora")
    text = "GET https://user:pass@host/a?sig=abc failed for hf_abcdefghijklmnop"
    queue.finish(claim(queue), JobState.FAILED, error=text, error_code="E")
    failed = queue.get(job.id)
    assert failed is not None
    assert failed.error == "GET https://***@host/a?*** failed for hf_***"


class TestSecret:
    def test_only_the_worker_gets_it(self, queue: JobQueue) -> None:
        new = new_job(secret="ciphertext")
        assert "ciphertext" not in repr(new)
        (job,) = queue.submit([new])
        held = claim(queue)
        assert held.secret == "ciphertext"
        assert "ciphertext" not in repr([job, held, queue.get(job.id), queue.events(job.id)])
        queue.submit([new_job()])
        assert claim(queue).secret is None

    @pytest.mark.parametrize("end", ["succeed", "fail", "cancel", "retry", "lost"])
    def test_it_goes_at_the_end(self, queue: JobQueue, url: str, end: str) -> None:
        (job,) = queue.submit([new_job(secret="ciphertext")])
        for _ in range(2):
            queue.retry(claim(queue), error="e", error_code="E", delay_s=0)
        held = claim(queue)
        assert held.secret == secret_of(url, job.id) == "ciphertext"
        if end == "lost":
            let_pass(url, 31)
            queue.sweep()
        else:
            (ENDS | FENCED)[end](queue, held)
        assert state_of(queue, job.id).terminal
        assert secret_of(url, job.id) is None

    def test_it_goes_when_a_queued_job_is_canceled(self, queue: JobQueue, url: str) -> None:
        (job,) = queue.submit([new_job(secret="ciphertext")])
        queue.cancel(job.id)
        assert secret_of(url, job.id) is None


class TestCancel:
    def test_a_queued_job_is_canceled_at_once(self, queue: JobQueue) -> None:
        (job,) = submit(queue, "lora")
        canceled, changed = queue.cancel(job.id) or (None, None)
        assert canceled is not None
        assert (canceled.state, changed) == (JobState.CANCELED, True)
        assert canceled.finished_at is not None
        assert queue.claim("flux", "replica") is None
        assert queue.cancel(job.id) == (canceled, False)
        check_history(queue.events(job.id))

    def test_the_worker_of_a_running_job_is_told(self, queue: JobQueue) -> None:
        (job,) = submit(queue, "lora")
        held = claim(queue)
        for _ in range(2):
            asked, changed = queue.cancel(job.id) or (None, None)
            assert asked is not None
            assert (asked.state, asked.cancel_requested, changed) == (JobState.IN_PROGRESS, True, True)
        assert queue.heartbeat(held, STEP, renew=True).cancel_requested
        queue.finish(held, JobState.CANCELED)
        assert queue.cancel(job.id) == (queue.get(job.id), False)

    def test_success_wins_over_a_late_request(self, queue: JobQueue) -> None:
        (job,) = submit(queue, "lora")
        held = claim(queue)
        queue.cancel(job.id)
        queue.finish(held, JobState.SUCCEEDED, result={})
        assert state_of(queue, job.id) is JobState.SUCCEEDED

    @pytest.mark.parametrize("end", ["retry", "release", "lost", "late"])
    def test_a_run_without_result_ends_canceled(self, queue: JobQueue, url: str, end: str) -> None:
        (job,) = submit(queue, "lora")
        held = claim(queue)
        queue.cancel(job.id)
        if end in ("retry", "release"):
            FENCED[end](queue, held)
        else:
            let_pass(url, {"lost": 31, "late": 3601}[end])
            assert queue.sweep() == 1
        canceled = queue.get(job.id)
        assert canceled is not None
        assert (canceled.state, canceled.error, canceled.error_code) == (JobState.CANCELED, None, None)
        assert canceled.finished_at is not None
        check_history(queue.events(job.id))

    def test_an_ended_job_is_left_as_it_is(self, queue: JobQueue) -> None:
        for state in (JobState.SUCCEEDED, JobState.FAILED):
            (job,) = submit(queue, "lora")
            queue.finish(claim(queue), state)
            before = queue.get(job.id)
            assert queue.cancel(job.id) == (before, False)
            assert queue.get(job.id) == before


class TestIdempotency:
    def test_the_same_key_and_body_is_the_same_job(self, queue: JobQueue) -> None:
        (first,) = queue.submit([new_job(idempotency_key="k", fingerprint="f")])
        queue.finish(claim(queue), JobState.SUCCEEDED, result={"n": 1})
        (second,) = queue.submit([new_job(idempotency_key="k", fingerprint="f")])
        assert second.id == first.id
        assert second.state is JobState.SUCCEEDED
        assert queue.find("", "k") == second
        assert len(queue.events(first.id)) == 3

    def test_another_body_is_a_conflict_and_stores_nothing(self, queue: JobQueue) -> None:
        queue.submit([new_job(idempotency_key="k", fingerprint="f")])
        beside = new_job()
        with pytest.raises(IdempotencyConflict):
            queue.submit([beside, new_job(idempotency_key="k", fingerprint="g")])
        assert queue.get(beside.id) is None
        assert queue.events(beside.id) == []
        assert queue.depths()["flux"].queued == 1

    def test_keys_belong_to_tenants(self, queue: JobQueue) -> None:
        mine = new_job(idempotency_key="k", fingerprint="f", tenant="me")
        yours = new_job(idempotency_key="k", fingerprint="g", tenant="you")
        assert [job.id for job in queue.submit([mine, yours])] == [mine.id, yours.id]
        found = queue.find("you", "k")
        assert found is not None
        assert found.id == yours.id
        assert queue.find("", "k") is None

    def test_twins_of_one_batch(self, queue: JobQueue) -> None:
        one, other, third = (new_job(idempotency_key=key, fingerprint="f") for key in ("a", "b", "a"))
        assert [job.id for job in queue.submit([one, other, third])] == [one.id, other.id, one.id]
        assert queue.depths()["flux"].queued == 2

    def test_concurrent_twins(self, queue: JobQueue) -> None:
        """Sixteen threads submit one key at once: there is one job, and all of them get it."""
        ready, ids = threading.Barrier(16), []

        def post() -> None:
            ready.wait()
            ids.append(queue.submit([new_job(idempotency_key="k", fingerprint="f")])[0].id)

        threads = [threading.Thread(target=post) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ids) == 16
        assert len(set(ids)) == 1
        assert len(queue.events(ids[0])) == 1
        assert queue.depths()["flux"].queued == 1


def test_jobs_are_stored_together_and_in_order(queue: JobQueue) -> None:
    batch = [new_job(f"lora-{index}") for index in range(300)]
    stored = queue.submit(batch)
    assert [job.id for job in stored] == [job.id for job in batch]
    assert [job.seq for job in stored] == sorted(job.seq for job in stored)
    with pytest.raises(IntegrityError):
        queue.submit([new_job(), batch[0]])
    assert queue.depths()["flux"].queued == 300


def test_the_place_in_the_queue(queue: JobQueue) -> None:
    first, second, third = queue.submit([new_job("a"), new_job("b"), new_job("c")])
    queue.submit([new_job(model="sd15")])
    assert [queue.ahead(job) for job in (first, second, third)] == [0, 1, 2]
    queue.cancel(second.id)
    assert queue.ahead(third) == 1
    running = claim(queue)
    assert running.job.id == first.id
    assert queue.ahead(running.job) is None
    assert queue.ahead(third) == 0


def test_which_jobs_have_ended(queue: JobQueue) -> None:
    waiting, running, succeeded, canceled = submit(queue, "a", "b", "c", "d")
    queue.cancel(canceled.id)
    claim(queue, warm=["b"], patience_s=9)
    queue.finish(claim(queue, "other", warm=["c"], patience_s=9), JobState.SUCCEEDED)
    ids = [waiting.id, running.id, succeeded.id, canceled.id, "unknown"]
    assert queue.finished(ids) == {succeeded.id, canceled.id, "unknown"}
    assert queue.finished([]) == set()


def test_how_many_wait(queue: JobQueue) -> None:
    assert queue.waiting("me") == (0, 0)
    queue.submit([new_job(tenant=tenant) for tenant in ("me", "you", "me", "", "me")])
    assert (queue.waiting("me"), queue.waiting("you"), queue.waiting("nobody")) == ((5, 3), (5, 1), (5, 0))
    held = claim(queue)
    assert held.job.tenant == "me"
    assert queue.waiting("me") == (4, 2)
    queue.release(held)
    assert queue.waiting("me") == (5, 3)


def submit_for(queue: JobQueue, tenant: str, *adapters: str) -> list[Job]:
    return queue.submit([new_job(adapter, tenant=tenant) for adapter in adapters])


def summary(job: Job | None) -> JobSummary:
    return JobSummary(**{field.name: getattr(job, field.name) for field in fields(JobSummary)})


class TestList:
    def test_the_newest_come_first_page_by_page(self, queue: JobQueue) -> None:
        mine = [job for n in range(5) for job in submit_for(queue, "me", f"{n}")]
        submit_for(queue, "you", "theirs")
        queue.cancel(mine[3].id)
        queue.finish(claim(queue), JobState.SUCCEEDED)
        left = [summary(queue.get(job.id)) for job in reversed(mine)]
        assert queue.list("me") == left
        pages, before = [], None
        while found := queue.list("me", limit=2, before=before):
            assert found == left[: len(found)]
            pages.append(len(found))
            left, before = left[len(found) :], found[-1].seq
        assert pages == [2, 2, 1]
        assert queue.list("nobody") == []

    def test_of_a_state_and_a_model(self, queue: JobQueue) -> None:
        first, second = submit_for(queue, "me", "a", "b")
        (other,) = queue.submit([new_job(tenant="me", model="sd15")])
        queue.cancel(first.id)

        def ids(**wanted: Any) -> list[str]:
            return [job.id for job in queue.list("me", **wanted)]

        assert ids(state=JobState.IN_QUEUE) == [other.id, second.id]
        assert ids(state=JobState.CANCELED) == [first.id]
        assert ids(state=JobState.FAILED) == []
        assert ids(model="flux") == [second.id, first.id]
        assert ids(model="flux", state=JobState.IN_QUEUE, before=second.seq) == []
        assert ids(model="sd15", limit=1) == [other.id]


def test_the_load_of_each_model(queue: JobQueue, url: str) -> None:
    assert queue.depths() == {}
    submit(queue, "a", "b", "c")
    let_pass(url, 10)
    queue.submit([new_job(model="sd15")])
    queue.announce("sdxl-replica", "sdxl", [])
    claim(queue, "flux-replica")
    depths = queue.depths()
    assert set(depths) == {"flux", "sd15", "sdxl"}
    flux, sd15, sdxl = depths["flux"], depths["sd15"], depths["sdxl"]
    assert (flux.queued, flux.running, flux.workers) == (2, 1, 1)
    assert 10 <= flux.oldest_s < 20
    assert (sd15.queued, sd15.running, sd15.workers) == (1, 0, 0)
    assert (sdxl.queued, sdxl.running, sdxl.workers, sdxl.oldest_s) == (0, 0, 1, 0.0)
    queue.withdraw("sdxl-replica")
    assert set(queue.depths()) == {"flux", "sd15"}


def test_progress_of_every_phase_comes_back(queue: JobQueue) -> None:
    submit(queue, "lora")
    held = claim(queue)
    for phase in Phase:
        progress = Progress(prompt=2, prompts=3, step=0, steps=28, phase=phase)
        queue.heartbeat(held, progress, renew=False)
        job = queue.get(held.job.id)
        assert job is not None
        assert job.progress == progress


def test_how_followed_jobs_are_doing(queue: JobQueue) -> None:
    waiting, running, canceled = submit(queue, "a", "b", "c")
    claim(queue, warm=["b"], patience_s=9)
    queue.cancel(canceled.id)
    ids = [waiting.id, running.id, canceled.id]
    histories = dict(queue.histories([*ids, "unknown"]))
    assert histories.pop("unknown") == []
    assert histories == {job_id: queue.events(job_id) for job_id in ids}
    latest = {job.id: (job, last) for job, last in queue.latest([*ids, "unknown"])}
    assert latest == {job_id: (summary(queue.get(job_id)), histories[job_id][-1].id) for job_id in ids}


def test_the_places_of_several_jobs(queue: JobQueue) -> None:
    first, second, third = submit(queue, "a", "b", "c")
    (other,) = queue.submit([new_job(model="sd15")])
    asked = [summary(job) for job in (first, third, other)]
    assert queue.places(asked) == {first.id: 0, third.id: 2, other.id: 0}
    queue.cancel(first.id)
    assert queue.places(asked) == {third.id: 1, other.id: 0}
    assert queue.places([summary(second)]) == {second.id: queue.ahead(second)}
