"""Accepted jobs survive the loss of the head and of a node: three Ray nodes, Redis, PostgreSQL and S3."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.cluster_utils import Cluster

from cluster.jobs.model import JobState
from cluster.jobs.queue import JobQueue
from cluster.objects.opening import open_store
from tests.cluster.databases.postgres import PostgresServer
from tests.faults.redis import PASSWORD, serving_redis
from tests.faults.service import Service, body, long_body, worker_config
from tests.parity.cases import FOLDER
from tests.support.s3 import BUCKET, S3Server
from tests.support.service import finished, free_port, replica_pids, serve_run, submit, wait_until

pytestmark = pytest.mark.slow

LEASE_S = 8.0


class Nodes:
    """A cluster with a head without replicas, one node for the gateway and one for workers."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "gcs_server_port": free_port(),
            "redis_password": PASSWORD,
        }
        self.start_head()
        self.front_port = free_port()
        self._add("front", self.front_port)
        self._back = self._add("back", free_port())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._head['gcs_server_port']}"

    def start_head(self) -> None:
        """Start the head on the same port each time; its state is in Redis."""
        self._cluster.add_node(**self._head)

    def kill_head(self) -> None:
        """Kill the head with SIGKILL."""
        head: Any = self._cluster.head_node
        head.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self._cluster.head_node = None

    def exchange_back(self) -> None:
        """Add a second node for workers, then kill the first."""
        lost, self._back = self._back, self._add("back", free_port())
        self._cluster.remove_node(lost, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()

    def _add(self, place: str, port: int) -> Any:
        """Start a node with the resource `place`. Nodes share one address; each proxy needs its own port."""
        ports = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port)}
        return self._cluster.add_node(num_cpus=2, resources={place: 1}, env_vars=ports)


@pytest.fixture(scope="module")
def nodes(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, s3_server: S3Server
) -> Iterator[Nodes]:
    ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's socket paths have a maximum length.
    database = PostgresServer(flush=False)
    loras = tmp_path_factory.mktemp("loras")
    shutil.copy(FOLDER / "flux" / "lora" / "tiny_a.safetensors", loras / "flux.safetensors")
    with pytest.MonkeyPatch.context() as patch, serving_redis() as redis:
        environment = {
            **s3_server.environment,
            "JOBS_URL": database.create(),
            "OUTPUT_BASE_PATH": f"s3://{BUCKET}/{uuid.uuid4()}",
            "CHECKPOINTS_PATH": str(checkpoints),
            "WORKFLOWS_BASE_PATH": str(loras),
            "RAY_TMPDIR": ray_folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_REDIS_ADDRESS": redis,
            "RAY_external_storage_namespace": "nodes",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "300",  # Nodes must not exit while the head is down.
        }
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(tmp_path_factory.mktemp("nodes"))
        nodes = Nodes()
        try:
            yield nodes
        finally:
            nodes.close()
            database.close()
            shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def service(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port, folder = free_port(), tmp_path_factory.mktemp("service")
    environment = {"RAY_ADDRESS": nodes.address, "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    with serve_run(placed_config(port), port, folder, environment) as client:
        queue, store = JobQueue(os.environ["JOBS_URL"]), open_store(os.environ["OUTPUT_BASE_PATH"])
        yield Service(client, queue, store, folder, port, LEASE_S)
        queue.close()


def placed_config(port: int) -> str:
    """Return a config that places the gateway and the workers on different nodes, not on the head."""
    config = yaml.safe_load(worker_config(port, LEASE_S, ("flux",)))
    for application, place in zip(config["applications"], ("front", "back"), strict=True):
        for deployment in application["deployments"]:
            deployment["ray_actor_options"] = {"num_cpus": 0.5, "resources": {place: 0.01}}
    return yaml.safe_dump(config, sort_keys=False)


def test_the_loss_of_the_head_stops_no_job(nodes: Nodes, service: Service) -> None:
    worker, lost_at = service.running(service.submit(long_body())), time.time()
    nodes.kill_head()
    with httpx.Client(base_url=f"http://127.0.0.1:{nodes.front_port}", timeout=60) as door:
        headless, other = submit(door, body()), submit(door, long_body())
        service.accepted += [headless, other]
        assert finished(door, headless)["status"] == "succeeded", "jobs must run without the head"
    service.running(other)
    assert not service.answers()
    started_at = time.time()
    nodes.start_head()
    wait_until(service.answers, 120, "the head's return")
    returned_s = time.time() - started_at
    service.submit(body())
    ended = service.kept(lost_at, recovery_s=returned_s)
    assert {(job.state, job.attempts) for job in ended.values()} == {(JobState.SUCCEEDED, 1)}
    assert replica_pids("flux") == [worker]


def test_the_loss_of_a_node_loses_no_job(nodes: Nodes, service: Service) -> None:
    job_id = service.submit(long_body(prompts=3))
    for seed in range(3):
        service.submit(body(seeds=(seed,)))
    service.running(job_id)
    lost_at = time.time()
    nodes.exchange_back()
    ended = service.kept(lost_at)
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert ended[job_id].attempts == 2
