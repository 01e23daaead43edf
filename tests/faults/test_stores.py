"""Accepted jobs survive the loss of their table, full disks, a lack of memory, and too few GPUs.

All tests use one service on PostgreSQL and a local directory. The last one kills it and starts another.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from ray._private.utils import get_num_cpus

from cluster.failures import FailureCode
from cluster.jobs.model import JobState
from tests.cluster.databases.postgres import PostgresServer
from tests.faults.service import MODELS, Service, body, kill_all, long_body, serving
from tests.support.service import descendants, replica_pids, wait_until
from tests.support.web import Site, serving_site

pytestmark = pytest.mark.slow

LEASE_S = 12.0
"""Seconds; long enough to separate an outage that a run survives from one that it does not."""

TURN_S = 15.0
"""How long a job waits for another model's only worker to yield its place; by default a minute."""

CLOCK = """
import os, time
real, hours = time.time, os.environ.get("TEST_CLOCK_JUMPS_H")
if hours:
    time.time = lambda: real() + 3600 * float(hours) * (int(time.monotonic()) % 3 - 1)
"""
"""Makes the clock of a Python process jump every second if its environment sets TEST_CLOCK_JUMPS_H."""


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
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small separate disk if this user may mount one; else a directory."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = not subprocess.call(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder])
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, site: Site, disk: Path
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    (folder / "sitecustomize.py").write_text(CLOCK)
    return {
        "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
        "OUTPUT_BASE_PATH": f"file://{disk}/outputs",
        "LORA_DOWNLOAD_CACHE_DIR": f"{disk}/lora_cache",
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
    """Stop the database server for a while; return the id of a job whose submit is retried afterwards."""
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
    gone_at = time.time()
    away(service, postgres, 2)
    assert {job.attempts for job in service.kept(gone_at).values()} == {1}


def test_a_table_that_is_away_for_longer_stops_its_workers_in_time(
    service: Service, postgres: PostgresServer
) -> None:
    job_id = service.submit(long_body(steps=150, prompts=3))
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
    assert worker in replica_pids("flux"), "the worker must stop the run, not exit"


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Leave no byte free until the block ends."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65536))
    assert not shutil.disk_usage(disk).free
    yield
    filler.unlink()


def test_a_full_disk_fails_jobs_with_a_code_until_there_is_room(
    service: Service, site: Site, disk: Path
) -> None:
    if not disk.is_mount():
        pytest.skip("this user may not mount a small disk")
    lora = (service.folder / "loras" / "flux.safetensors").read_bytes()
    elsewhere = body() | {"loras": [{"path": site.file("/style.safetensors", lora)}]}
    worker, full_at = service.warm_worker(), time.time()
    with filled(disk):
        local, remote = service.submit(body()), service.submit(elsewhere)
        wait_until(lambda: service.queue.finished([local, remote]) == {local, remote}, 120, "all attempts")
    ended = service.kept(full_at)
    assert (ended[local].error_code, ended[local].attempts) == (FailureCode.OUTPUT_STORE_ERROR, 3)
    assert (ended[remote].error_code, ended[remote].attempts) == (FailureCode.LORA_STORE_ERROR, 3)
    roomy_at = time.time()
    for request in (body(), elsewhere):
        service.submit(request)
    ended = service.kept(roomy_at)
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert worker in replica_pids("flux")


def test_a_picture_without_room_in_memory_fails_with_a_code(service: Service) -> None:
    worker, drops = service.warm_worker(), service.said("dropping all adapters for a second try")
    room = psutil.Process(worker).memory_info().vms + 128 * 2**20  # The picture needs 200 MiB.
    limits = resource.prlimit(worker, resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    limited_at = time.time()
    try:
        large, small = service.submit(body(side=1024)), service.submit(body())
        ended = service.kept(limited_at)
    finally:
        resource.prlimit(worker, resource.RLIMIT_AS, limits)
    assert (ended[large].error_code, ended[large].attempts) == (FailureCode.OUT_OF_MEMORY, 1)
    assert service.said("dropping all adapters for a second try") == drops + 1
    roomy_at, again = time.time(), service.submit(body(side=1024))
    assert ended[small].state is service.kept(roomy_at)[again].state is JobState.SUCCEEDED
    assert worker in replica_pids("flux")


def test_a_worker_s_clock_may_jump(service: Service) -> None:
    environment = {"env_vars": {"TEST_CLOCK_JUMPS_H": "5"}}
    before = set(replica_pids("flux"))
    service.redeploy(ray_actor_options={"num_cpus": 0.5, "runtime_env": environment})
    wait_until(lambda: not before & set(replica_pids("flux")), 120, "workers with other clocks")
    jumping_at, _ = time.time(), service.submit(long_body())
    for job in service.kept(jumping_at).values():
        assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)
        assert job.started_at and job.finished_at and 0 < job.finished_at - job.created_at < 600


def test_a_job_gets_its_turn_beside_steady_traffic_of_another_model(service: Service) -> None:
    busy, other = MODELS
    place = {"num_cpus": 0.6 * get_num_cpus()}  # As with one GPU: there is no room for a second worker.
    before = {pid for model in MODELS for pid in replica_pids(model)}
    service.redeploy(ray_actor_options=place, policy={"yield_busy_after_s": TURN_S})
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
        wait_until(lambda: service.job(waiting).state.terminal, 120, "its turn")
        waited_s = (service.job(waiting).started_at or 0.0) - service.job(waiting).created_at
        turned_at = time.time()
        wait_until(lambda: replica_pids(busy), 120, "the first model's return")
    finally:
        stop.set()
        traffic.join()
    assert waited_s > TURN_S
    ended = service.kept(turned_at)
    assert {(job.state, job.attempts) for job in ended.values()} == {(JobState.SUCCEEDED, 1)}


def test_another_cluster_goes_on_with_what_one_left(
    service: Service, checkpoints: Path, environment: dict[str, str]
) -> None:
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
