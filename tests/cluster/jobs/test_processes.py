"""Several processes on one table: no job is claimed twice or lost, even if a process dies."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event

import pytest

from cluster.jobs.model import JobState
from cluster.jobs.opening import open_queue
from cluster.jobs.queue import JobQueue
from tests.cluster.jobs.tables import MODEL, STEP, check_history, claim, new_job, state_of, submit

SPAWN = multiprocessing.get_context("spawn")

JOBS = 240


def work(url: str, owner: str, submitted: Event, claimed: Queue[list[str]]) -> None:
    """Claim, send heartbeats and finish until all jobs are submitted and ended; report the claims."""
    queue, mine, warm, dice = open_queue(url), [], [], random.Random(owner)
    while True:
        held = queue.claim(MODEL, owner, warm=warm[-3:], patience_s=0.1)
        if held is None:
            if submitted.is_set() and not sum(
                depth.queued + depth.running for depth in queue.depths().values()
            ):
                break
            time.sleep(0.01)
            continue
        mine.append(held.job.id)
        warm = [adapter for adapter in warm if adapter != held.job.adapter] + [held.job.adapter]
        queue.heartbeat(held, STEP, renew=True)
        # Some runs end in a way that requeues the job.
        if held.epoch == 1 and dice.random() < 0.2:
            queue.release(held)
        elif held.epoch == 1 and dice.random() < 0.2:
            queue.retry(held, error="once", error_code="E", delay_s=0)
        else:
            queue.record_output(held, 0, {"by": owner})
            queue.finish(held, JobState.SUCCEEDED, result={"by": owner})
    claimed.put(mine)


def test_no_job_is_claimed_twice_and_none_is_lost(url: str) -> None:
    queue, submitted, claimed = JobQueue(url), SPAWN.Event(), SPAWN.Queue()
    workers = [SPAWN.Process(target=work, args=(url, f"replica-{n}", submitted, claimed)) for n in range(4)]
    for worker in workers:
        worker.start()
    ids = []
    for n in range(JOBS // 8):
        ids += [job.id for job in queue.submit([new_job(f"lora-{(n + i) % 7}") for i in range(8)])]
    submitted.set()
    claims = [job_id for _ in workers for job_id in claimed.get(timeout=120)]
    for worker in workers:
        worker.join()
    runs = 0
    for job_id in ids:
        history = queue.events(job_id)
        check_history(history)
        runs += sum(event.state is JobState.IN_PROGRESS for event in history)
        job = queue.get(job_id)
        assert job is not None
        assert (job.state, job.result) == (JobState.SUCCEEDED, {"by": job.owner})
        assert queue.outputs(job_id) == [{"by": job.owner}]
        assert job.epoch == claims.count(job_id)
    assert runs == len(claims) > JOBS
    queue.close()


def hold(url: str, owner: str, claimed: Queue[str]) -> None:
    """Claim one job and renew its lease forever."""
    queue = open_queue(url, lease_s=2.0)
    held = claim(queue, owner)
    claimed.put(held.job.id)
    while True:
        queue.heartbeat(held, STEP, renew=True)
        time.sleep(0.05)


@pytest.mark.slow
def test_the_job_of_a_killed_worker_runs_again_when_its_lease_ends(url: str) -> None:
    queue = JobQueue(url, lease_s=2.0, max_attempts=2)
    (job,) = submit(queue, "a")
    for attempt in (1, 2):
        claimed: Queue[str] = SPAWN.Queue()
        victim = SPAWN.Process(target=hold, args=(url, f"victim-{attempt}", claimed))
        victim.start()
        assert claimed.get(timeout=30) == job.id
        time.sleep(2.5)
        assert queue.sweep() == 0, "its heartbeat keeps the job"
        victim.kill()
        victim.join()
        killed = time.monotonic()
        while not queue.sweep():
            assert time.monotonic() - killed < 20
            time.sleep(0.05)
    assert state_of(queue, job.id) is JobState.FAILED
    check_history(queue.events(job.id))
    assert [event.state for event in queue.events(job.id)].count(JobState.IN_PROGRESS) == 2
    queue.close()


def write_and_die(url: str, begun: Queue[bool]) -> None:
    """Exit in the middle of a transaction, without any cleanup."""
    queue = open_queue(url)
    with queue._database.write() as connection:
        connection.exec_driver_sql("DELETE FROM jobs")
        begun.put(True)
        time.sleep(60)


@pytest.mark.slow
def test_a_transaction_dies_with_its_process(url: str) -> None:
    queue, begun = JobQueue(url), SPAWN.Queue()
    (job,) = submit(queue, "a")
    victim = SPAWN.Process(target=write_and_die, args=(url, begun))
    victim.start()
    assert begun.get(timeout=30)
    victim.kill()
    victim.join()
    assert claim(queue).job.id == job.id
    queue.close()
