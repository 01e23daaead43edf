"""`?wait=` answers as soon as the job ends, in whatever process that happens."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from cluster.jobs.model import JobState
from tests.serve_app.conftest import Service, running

PATIENCE_S = 50
LONG_BEFORE_S = 25
"""Seconds; far less than the requested wait, far more than a busy machine needs."""


def poll(
    client: httpx.Client, job_id: str, kind: str = "status", wait_s: float = PATIENCE_S
) -> tuple[str, float]:
    """Return the state in a long poll's answer, and the seconds that took."""
    start = time.monotonic()
    answer = client.get(f"/v1/requests/{job_id}/{kind}", params={"wait": wait_s}, timeout=90)
    return answer.json()["status"], time.monotonic() - start


def test_it_wakes_when_another_connection_ends_the_job(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit())
    with ThreadPoolExecutor(2) as pool:
        polls = [pool.submit(poll, fresh.client, claim.job.id, kind) for kind in ("status", "result")]
        time.sleep(0.5)
        assert not any(each.done() for each in polls)
        fresh.publish(claim)
        for each in polls:
            state, seconds = each.result()
            assert state == "succeeded"
            assert seconds < LONG_BEFORE_S


def test_it_wakes_when_the_job_is_canceled_through_another_gateway(fresh: Service) -> None:
    job_id = fresh.submit()
    with running(fresh.settings) as other, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(poll, other, job_id)
        time.sleep(0.3)
        fresh.client.delete(f"/v1/requests/{job_id}")
        state, seconds = waiting.result()
    assert state == "canceled"
    assert seconds < LONG_BEFORE_S


def test_a_job_that_has_ended_is_answered_at_once(fresh: Service) -> None:
    job_id = fresh.submit()
    fresh.client.delete(f"/v1/requests/{job_id}")
    state, seconds = poll(fresh.client, job_id)
    assert state == "canceled"
    assert seconds < LONG_BEFORE_S


def test_a_start_does_not_end_the_wait(fresh: Service) -> None:
    job_id = fresh.submit()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(poll, fresh.client, job_id, wait_s=1.0)
        fresh.claim(job_id)
        state, seconds = waiting.result()
    assert state == "in_progress"
    assert seconds >= 1.0


def test_many_wait_for_different_jobs_at_once(fresh: Service) -> None:
    ids = [fresh.submit() for _ in range(40)]
    with ThreadPoolExecutor(2 * len(ids)) as pool:
        polls = [pool.submit(poll, fresh.client, job_id) for job_id in ids for _ in range(2)]
        time.sleep(0.5)
        for job_id in ids[:-1]:
            assert fresh.queue.cancel(job_id) is not None
        claim = fresh.claim(ids[-1])
        fresh.queue.finish(claim, JobState.FAILED, error="It broke.", error_code="INTERNAL_ERROR")
        answers = [each.result() for each in polls]
    assert [state for state, _ in answers] == ["canceled"] * 78 + ["failed"] * 2
    assert all(seconds < LONG_BEFORE_S for _, seconds in answers)


def test_waiting_requests_hold_no_threads(fresh: Service) -> None:
    """With more long polls than the 40 threads of the process, the gateway still submits and reads."""
    job_id = fresh.submit()
    with ThreadPoolExecutor(60) as pool:
        polls = [pool.submit(poll, fresh.client, job_id) for _ in range(60)]
        time.sleep(0.5)
        start = time.monotonic()
        fresh.submit()
        assert time.monotonic() - start < LONG_BEFORE_S
        fresh.client.delete(f"/v1/requests/{job_id}")
        assert {each.result()[0] for each in polls} == {"canceled"}


def test_a_client_that_goes_away_leaves_nothing_behind(fresh: Service) -> None:
    job_id = fresh.submit()
    for _ in range(3):
        try:
            fresh.client.get(f"/v1/requests/{job_id}/status", params={"wait": 1}, timeout=0.1)
        except httpx.ReadTimeout:
            continue
    assert fresh.status(job_id, wait=0.1)["status"] == "in_queue"
