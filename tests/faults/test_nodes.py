"""Accepted jobs survive the loss of a node: three Ray nodes, PostgreSQL and S3."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster

from cluster.jobs import JobState
from cluster.objects import open_store
from cluster.queue import JobQueue
from tests.cluster.postgres import PostgresServer
from tests.faults.service import Service, body, long_body, worker_config
from tests.parity.cases import FOLDER
from tests.s3 import BUCKET, S3Server
from tests.service import free_port, serve_run

pytestmark = pytest.mark.slow

LEASE_S = 8.0


@dataclass(frozen=True)
class Nodes:
    """A running cluster: the head with the gateway, and two nodes for workers, each with its own folder."""

    cluster: Cluster
    backs: dict[Path, object]

    def lose(self, pid: int) -> None:
        """End the node that a process belongs to, at once."""
        folder = Path(f"/proc/{pid}/cwd").resolve()
        self.cluster.remove_node(self.backs.pop(folder), allow_graceful=False)


@pytest.fixture
def nodes(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, s3_server: S3Server
) -> Iterator[Nodes]:
    ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's socket paths are bounded in length.
    database, cluster = PostgresServer(flush=False), Cluster()
    loras = tmp_path_factory.mktemp("loras")
    shutil.copy(FOLDER / "flux" / "lora" / "tiny_a.safetensors", loras / "flux.safetensors")
    environment = {
        **s3_server.environment,
        "JOBS_URL": database.create(),
        "OUTPUT_BASE_PATH": f"s3://{BUCKET}/{uuid.uuid4()}",
        "CHECKPOINTS_PATH": str(checkpoints),
        "WORKFLOWS_BASE_PATH": str(loras),
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_MODE": "disabled",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            cluster.add_node(num_cpus=2, resources={"front": 1}, include_dashboard=False)
            backs = {}
            for name in ("one", "two"):
                folder = tmp_path_factory.mktemp(name).resolve()
                patch.chdir(folder)
                # All nodes have one address here.
                ports = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port())}
                backs[folder] = cluster.add_node(num_cpus=2, resources={"back": 1}, env_vars=ports)
            yield Nodes(cluster, backs)
        finally:
            cluster.shutdown()
            database.close()
            shutil.rmtree(ray_folder, ignore_errors=True)


def placed_config(port: int) -> str:
    """Keep the gateway on the head, and workers off it."""
    config = yaml.safe_load(worker_config(port, LEASE_S, ("flux",)))
    for application, place in zip(config["applications"], ("front", "back"), strict=True):
        for deployment in application["deployments"]:
            deployment["ray_actor_options"] = {"num_cpus": 0.5, "resources": {place: 0.01}}
    return yaml.safe_dump(config, sort_keys=False)


def test_the_loss_of_a_node_loses_no_job(nodes: Nodes, tmp_path: Path) -> None:
    port = free_port()
    environment = {"RAY_ADDRESS": str(nodes.cluster.address), "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    with serve_run(placed_config(port), port, tmp_path, environment) as client:
        queue, store = JobQueue(os.environ["JOBS_URL"]), open_store(os.environ["OUTPUT_BASE_PATH"])
        service = Service(client, queue, store, tmp_path, port, LEASE_S)
        job_id = service.submit(long_body(prompts=3))
        for seed in range(3):
            service.submit(body(seeds=(seed,)))
        worker, lost_at = service.running(job_id), time.time()
        nodes.lose(worker)
        ended = service.kept(lost_at)
        queue.close()
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert ended[job_id].attempts == 2
