"""Accepted jobs survive dead workers and gateways, a job that kills its worker, updates, and S3 faults.

All tests use one service on SQLite and S3. Each test ends by checking the contract of all its jobs.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
import uuid
from contextlib import closing

import httpx
import pytest

from cluster.failures import FailureCode
from cluster.jobs.model import Claim, JobState
from tests.cluster.jobs.tables import locked
from tests.faults.service import MODELS, Service, body, kill_unless_last_attempt, long_body
from tests.support.s3 import Proxy, delayed, passed_on, refused, reset_after_sending
from tests.support.service import finished, replica_pids, wait_until

pytestmark = pytest.mark.slow

KILLS = 10


def test_a_killed_worker_loses_no_job(service: Service) -> None:
    job_id = service.submit(long_body())
    for seed in range(3):
        service.submit(body(seeds=(seed,)))
    worker, killed_at = service.running(job_id), time.time()
    os.kill(worker, signal.SIGKILL)
    ended = service.kept(killed_at)
    assert all(job.state is JobState.SUCCEEDED for job in ended.values())
    # On a busy machine the next worker may lose its lease too.
    assert ended[job_id].attempts in (2, 3)
    result = service.client.get(f"/v1/requests/{job_id}/result").json()
    image = result["outputs"]["images"][0]
    assert f"/{job_id}/{ended[job_id].epoch}/" in image["url"]
    assert len(httpx.get(image["url"]).content) == image["bytes"]


def test_ten_workers_killed_at_random_moments(service: Service) -> None:
    dice, began = random.Random(6), time.time()
    for job_id in [service.submit(long_body(model)) for model in MODELS]:
        service.running(job_id)
    for _ in range(KILLS):
        model = dice.choice(MODELS)
        for wanted in MODELS:
            # Keep jobs in flight, with different numbers of prompts and lengths.
            if wanted not in (depths := service.queue.depths()) or depths[wanted].queued < 2:
                service.submit(long_body(wanted, steps=dice.randint(20, 60), prompts=dice.randint(1, 2)))
                service.submit(body(wanted))
        wait_until(lambda name=model: replica_pids(name), 120, f"a replica of {model}")
        time.sleep(dice.uniform(0, 4))
        kill_unless_last_attempt(service, model)
    ended = service.kept(began, timeout_s=400)
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert max(job.attempts for job in ended.values()) > 1


def stop_between_writes(pid: int) -> None:
    """Send SIGSTOP, but not while the process holds SQLite's lock: that would block everybody else."""
    file = os.environ["JOBS_URL"].removeprefix("sqlite:///")
    while True:
        os.kill(pid, signal.SIGSTOP)
        try:
            with closing(sqlite3.connect(file, timeout=0.5, isolation_level=None)) as table:
                table.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)


def test_a_worker_that_was_stopped_writes_nothing_when_it_goes_on(service: Service) -> None:
    job_id = service.submit(long_body(steps=20, prompts=12))
    worker = service.running(job_id)
    refusals = service.said("lease lost, nothing written")
    stop_between_writes(worker)
    try:
        stopped_at = time.time()
        claims: list[Claim] = []

        def claimed() -> list[Claim]:
            # Another worker has the job while the first one still believes that it owns it.
            claims.extend(filter(None, [service.queue.claim("flux", "flux@another:0:a", patience_s=0)]))
            return claims

        (claim,) = wait_until(claimed, 2 * service.lease_s + 20, "the end of the lease")
        assert (claim.job.id, claim.epoch) == (job_id, 2)
        time.sleep(max(0.0, stopped_at + 2 * service.lease_s - time.time()))
        recorded = service.queue.outputs(job_id)
    finally:
        os.kill(worker, signal.SIGCONT)
    wait_until(lambda: service.said("lease lost, nothing written") > refusals, 30, "the refusal")
    assert service.queue.outputs(job_id) == recorded
    assert [event.epoch for event in service.queue.events(job_id)][-1] == 2
    service.queue.release(claim)
    ended = service.kept(stopped_at)[job_id]
    assert (ended.state, ended.epoch) == (JobState.SUCCEEDED, 3)
    published = service.queue.outputs(job_id)
    assert published[: len(recorded)] == recorded
    assert {output["key"].split("/")[1] for output in published[len(recorded) :]} == {"3"}


def test_a_job_that_kills_its_workers_fails_and_harms_no_neighbour(service: Service) -> None:
    poison = service.submit(long_body())
    neighbours = [service.submit(body(model, seeds=(seed,))) for model in MODELS for seed in (1, 2)]
    for attempt in (1, 2, 3):
        wait_until(lambda n=attempt: service.job(poison).attempts == n, 120, f"attempt {attempt}")
        worker = service.running(poison, step=1)
        os.kill(worker, signal.SIGKILL)
    killed_at = time.time()
    after = service.submit(body(seeds=(9,)))
    ended = service.kept(killed_at)
    assert (ended[poison].error_code, ended[poison].attempts) == (FailureCode.WORKER_LOST, 3)
    assert {ended[job_id].state for job_id in (*neighbours, after)} == {JobState.SUCCEEDED}


def test_a_gateway_killed_under_load_forgets_no_answer(service: Service) -> None:
    answered: dict[str, str] = {}
    stop = threading.Event()

    def post(client: int) -> None:
        """Submit one request after the other; retry each until it gets a 200."""
        count = 0
        while not stop.is_set():
            key, count = f"client-{client}-{count}", count + 1
            answered[key] = repeat(service, key)
            time.sleep(0.3)

    clients = [threading.Thread(target=post, args=(n,)) for n in range(4)]
    job_id = service.submit(long_body("sd15"))
    for client in clients:
        client.start()
    time.sleep(2)
    gateway, killed_at = service.gateway(), time.time()
    os.kill(gateway, signal.SIGKILL)
    wait_until(lambda: [pid for pid in replica_pids("gateway") if pid != gateway], 60, "a new gateway")
    wait_until(service.answers, 60, "the gateway's return")
    away_s = time.time() - killed_at
    time.sleep(2)
    stop.set()
    for client in clients:
        client.join()
    assert len(set(answered.values())) == len(answered)
    assert all(repeat(service, key) == accepted for key, accepted in answered.items())
    other = service.client.post(
        "/v1/inference", json=body(seeds=(99,)), headers={"Idempotency-Key": next(iter(answered))}
    )
    assert (other.status_code, other.json()["detail"]["error"]["code"]) == (409, "IDEMPOTENCY_KEY_REUSED")
    service.accepted += answered.values()
    ended = service.kept(killed_at, recovery_s=away_s)
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert ended[job_id].attempts == 1


def repeat(service: Service, key: str) -> str:
    """Post the request of an idempotency key until it is accepted; return the job's id."""

    def answer() -> str | None:
        try:
            sent = service.client.post("/v1/inference", json=body(), headers={"Idempotency-Key": key})
        except httpx.TransportError:
            return None
        assert sent.status_code == 200 or sent.status_code >= 500, sent.text
        return sent.json()["request_id"] if sent.status_code == 200 else None

    return wait_until(answer, 60, "an answer")


def test_numbers_change_in_place_under_a_running_job(service: Service) -> None:
    job_id = service.submit(long_body())
    worker, changed_at = service.running(job_id), time.time()
    service.redeploy(downscale_to_zero_delay_s=30.0, health_check_timeout_s=20.0)
    assert service.kept(changed_at)[job_id].attempts == 1
    assert worker in replica_pids("flux")


def test_a_rolling_update_lets_running_jobs_finish(service: Service) -> None:
    jobs = [service.submit(long_body(model)) for model in MODELS]
    before, updated_at = {service.running(job_id) for job_id in jobs}, time.time()
    service.redeploy(adapter_bytes=1 << 29)
    wait_until(lambda: not before & set(replica_pids("flux")), 120, "the end of the old replica")
    jobs.append(service.submit(body()))
    ended = service.kept(updated_at)
    assert not before & {int(job.owner.split(":")[1]) for job in (ended[jobs[-1]],) if job.owner}
    assert [ended[job_id].attempts for job_id in jobs] == [1, 1, 1]


def test_a_model_may_go_and_come_back(service: Service) -> None:
    running, waiting = service.submit(long_body("sd15")), service.submit(body("sd15"))
    other = service.submit(body())
    service.running(running)
    service.redeploy(("flux",), adapter_bytes=1 << 29)
    wait_until(lambda: not replica_pids("sd15"), 60, "the end of the model's replicas")
    assert finished(service.client, running)["status"] == "succeeded"
    assert finished(service.client, other)["status"] == "succeeded"
    assert service.job(waiting).state is JobState.IN_QUEUE
    returned_at = time.time()
    service.redeploy(adapter_bytes=1 << 29)
    ended = service.kept(returned_at)
    assert [ended[job_id].attempts for job_id in (running, waiting)] == [1, 1]


def test_too_little_grace_releases_the_job_uncounted(service: Service) -> None:
    before = set(replica_pids("flux"))
    service.redeploy(("flux",), adapter_bytes=1 << 28, graceful_shutdown_timeout_s=4.0)
    wait_until(lambda: not before & set(replica_pids("flux")), 60, "the end of the replicas with much grace")
    job_id = service.submit(long_body(prompts=4))
    service.running(job_id)
    updated_at = time.time()
    service.redeploy(("flux",), adapter_bytes=1 << 27, graceful_shutdown_timeout_s=4.0)
    ended = service.kept(updated_at)[job_id]
    assert (ended.state, ended.attempts, ended.epoch) == (JobState.SUCCEEDED, 1, 2)


def test_an_upload_that_meets_faults_is_sent_again(service: Service, proxy: Proxy) -> None:
    job_id = service.submit(long_body())
    service.running(job_id)
    sick_at = time.time()
    proxy.faults.extend([delayed(2.0), refused, reset_after_sending(0), reset_after_sending(2000)])
    proxy.cut()
    assert service.kept(sick_at)[job_id].attempts == 1
    assert len(proxy.faults) < 4


def test_an_object_store_that_stays_away_fails_jobs_and_publishes_nothing(
    service: Service, proxy: Proxy
) -> None:
    proxy.otherwise = refused
    proxy.cut()
    try:
        lost = service.submit(body())
        wait_until(lambda: service.job(lost).state.terminal, 120, "the last attempt")
        saved = service.submit(body())
        wait_until(lambda: service.queue.events(saved)[-1].epoch == 1, 60, "the first attempt")
        wait_until(lambda: service.job(saved).state is JobState.IN_QUEUE, 60, "the first failure")
    finally:
        proxy.otherwise, back_at = passed_on, time.time()
    ended = service.kept(back_at)
    assert (ended[lost].error_code, ended[lost].attempts) == (FailureCode.OUTPUT_STORE_ERROR, 3)
    assert (ended[saved].state, ended[saved].attempts) == (JobState.SUCCEEDED, 2)


def test_a_locked_table_is_told_and_loses_nothing(service: Service) -> None:
    job_id = service.submit(long_body(prompts=2))
    service.running(job_id)
    key, locked_at = {"Idempotency-Key": str(uuid.uuid4())}, time.time()
    with locked(os.environ["JOBS_URL"]):
        refusal = service.client.post("/v1/inference", json=body(), headers=key)
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        assert service.client.get(f"/v1/requests/{job_id}/status").status_code == 200, "readers go on"
        time.sleep(max(0.0, locked_at + 3 * service.lease_s - time.time()))
    repeated, unlocked_at = service.submit(body(), **key), time.time()
    ended = service.kept(unlocked_at)
    assert ended[job_id].state is ended[repeated].state is JobState.SUCCEEDED


def test_an_idle_model_goes_to_zero_and_comes_back(service: Service) -> None:
    service.redeploy(adapter_bytes=1 << 26, downscale_to_zero_delay_s=5.0)
    wait_until(lambda: not any(map(replica_pids, MODELS)), 90, "scaling to zero")
    began = time.time()
    for model in MODELS:
        service.submit(body(model))
    ended = service.kept(began)
    assert {job.attempts for job in ended.values()} == {1}
