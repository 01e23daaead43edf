"""Accepted jobs survive the loss of their table, full disks, jobs that kill workers, and too few GPUs.

One service on PostgreSQL and a local directory; at the end it dies as a whole and another takes over.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.utils import get_num_cpus

from cluster.jobs import FailureCode, JobState
from deployments.autoscaling import YIELD_BUSY_AFTER_S
from tests.cluster.postgres import PostgresServer
from tests.faults.service import MODELS, Service, body, kill_all, long_body, serving
from tests.service import descendants, replica_pids, wait_until
from tests.web import Site, serving_site

pytestmark = pytest.mark.slow

LEASE_S = 12.0
"""Long enough to tell an absence that a run survives from one that it does not."""

CLOCK = """
import os, time
real, hours = time.time, os.environ.get("TEST_CLOCK_JUMPS_H")
if hours:
    time.time = lambda: real() + 3600 * float(hours) * (int(time.monotonic()) % 3 - 1)
"""
"""Makes the clock of a Python process jump every second where its environment says so."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer(flush=False)
    yield server
    server.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving_site() as site:
        yield site


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, site: Site
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    (folder / "sitecustomize.py").write_text(CLOCK)
    return {
        "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
        "OUTPUT_BASE_PATH": f"file://{folder}/outputs",
        "LORA_DOWNLOAD_CACHE_DIR": f"{folder}/lora_cache",
        "FETCH_ALLOW_HOSTS": site.host,
        "JOBS_URL": postgres.create(),
    }


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, environment: dict[str, str]
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, checkpoints, lease_s=LEASE_S, environment=environment) as made:
        yield made


def away(service: Service, postgres: PostgresServer, seconds: float) -> str:
    """Stop the table's server for a while; return the id of what a client submitted throughout."""
    key = {"Idempotency-Key": str(uuid.uuid4())}
    postgres.stop()
    back_at = time.monotonic() + seconds
    try:
        refusal = service.client.post("/v1/inference", json=body(), headers=key)
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        assert refusal.json()["detail"]["error"]["code"] == "STORE_UNAVAILABLE"
        time.sleep(max(0.0, back_at - time.monotonic()))
    finally:
        postgres.start()
    return service.submit(body(), **key)


def test_a_table_that_is_away_for_less_than_a_lease_costs_nothing(
    service: Service, postgres: PostgresServer
) -> None:
    service.running(service.submit(long_body(prompts=3)))
    away(service, postgres, 2)
    assert {job.attempts for job in service.kept().values()} == {1}


def test_a_table_that_is_away_for_longer_stops_its_workers_in_time(
    service: Service, postgres: PostgresServer
) -> None:
    job_id = service.submit(long_body(steps=150, prompts=5))
    worker, stops = service.running(job_id), service.said("lease lost, nothing written")
    gone_at = time.time()
    stopped_after: list[float] = []

    def look() -> None:
        wait_until(lambda: service.said("lease lost, nothing written") > stops, 60, "the end of the run")
        stopped_after.append(time.time() - gone_at)

    watching = threading.Thread(target=look)
    watching.start()
    away(service, postgres, 20)
    back_at = time.time()
    watching.join()
    assert stopped_after[0] < LEASE_S
    ended = service.kept(back_at)
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert ended[job_id].attempts == 2
    assert worker in replica_pids("flux"), "it ended the run, not itself"


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


def test_a_full_disk_fails_jobs_with_a_code_until_there_is_room(service: Service, site: Site) -> None:
    lora = (service.folder / "loras" / "flux.safetensors").read_bytes()
    elsewhere = body() | {"loras": [{"path": site.file("/style.safetensors", lora)}]}
    worker = service.running(service.submit(long_body()))
    service.kept()
    # What a file may grow to: the disk is full for the worker, and for nobody else.
    limits = resource.prlimit(worker, resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))
    try:
        local, remote = service.submit(body()), service.submit(elsewhere)
        ended = service.kept()
    finally:
        resource.prlimit(worker, resource.RLIMIT_FSIZE, limits)
    assert (ended[local].error_code, ended[local].attempts) == (FailureCode.OUTPUT_STORE_ERROR, 3)
    assert (ended[remote].error_code, ended[remote].attempts) == (FailureCode.LORA_STORE_ERROR, 3)
    roomy_at = time.time()
    for request in (body(), elsewhere):
        service.submit(request)
    ended = service.kept(roomy_at)
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert worker in replica_pids("flux")


def test_a_worker_s_clock_may_jump(service: Service) -> None:
    environment = {"env_vars": {"TEST_CLOCK_JUMPS_H": "5"}}
    before = set(replica_pids("flux"))
    service.redeploy(ray_actor_options={"num_cpus": 0.5, "runtime_env": environment})
    wait_until(lambda: not before & set(replica_pids("flux")), 120, "workers with other clocks")
    service.submit(long_body())
    for job in service.kept().values():
        assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)
        assert job.started_at and job.finished_at and 0 < job.finished_at - job.created_at < 600


def test_a_job_gets_its_turn_beside_steady_traffic_of_another_model(service: Service) -> None:
    busy, other = MODELS
    place = {"num_cpus": 0.6 * get_num_cpus()}  # As if there were one GPU: a second worker has no room.
    before = {pid for model in MODELS for pid in replica_pids(model)}
    service.redeploy(ray_actor_options=place)
    wait_until(
        lambda: not before & {*replica_pids(busy), *replica_pids(other)}, 60, "the end of the old version"
    )
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.wait(0.5):
            if service.queue.waiting("")[0] < 3:
                service.submit(long_body(busy))

    traffic = threading.Thread(target=keep_busy)
    traffic.start()
    try:
        wait_until(lambda: len(replica_pids(busy)) == 1 and not replica_pids(other), 120, "one busy worker")
        waiting = service.submit(body(other))
        wait_until(lambda: service.job(waiting).state.terminal, YIELD_BUSY_AFTER_S + 120, "its turn")
        waited_s = (service.job(waiting).started_at or 0.0) - service.job(waiting).created_at
        turned_at = time.time()
        wait_until(lambda: replica_pids(busy), 120, "the first model's return")
    finally:
        stop.set()
        traffic.join()
    assert waited_s > YIELD_BUSY_AFTER_S
    ended = service.kept(turned_at)
    assert {(job.state, job.attempts) for job in ended.values()} == {(JobState.SUCCEEDED, 1)}


def test_another_cluster_goes_on_with_what_one_left(
    service: Service, checkpoints: Path, environment: dict[str, str]
) -> None:
    service.redeploy()
    running, waiting = service.submit(long_body(prompts=3)), service.submit(body("sd15"))
    service.running(running)
    ended_at = time.time()
    (root,) = (pid for pid, title in descendants(os.getpid()).items() if "/serve run " in title)
    kill_all(root)
    again = serving(service.folder, checkpoints, lease_s=LEASE_S, environment=environment)
    with again as another:
        another.accepted = service.accepted
        ended = another.kept(ended_at)
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert ended[running].attempts == 2
    assert ended[waiting].attempts <= 2
