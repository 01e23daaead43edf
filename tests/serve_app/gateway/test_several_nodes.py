"""Two Ray nodes with PostgreSQL and S3: gateway on one, workers on the other; configs that must not start."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from cluster.jobs.queue import JobQueue
from serve_app import build_gateway, build_models
from serve_app.settings import GatewayArgs, ModelsArgs
from tests.cluster.databases.postgres import PostgresServer
from tests.parity.cases import FOLDER
from tests.support.s3 import BUCKET, S3Server
from tests.support.service import (
    edited_config,
    finished,
    free_port,
    replica_pids,
    serve_run,
    submit,
    wait_until,
)
from tests.support.web import serving_site

pytestmark = pytest.mark.slow

LORA = FOLDER / "flux" / "lora" / "tiny_a.safetensors"

PLACES = {"gateway": "front", "flux": "back"}
"""The resource of each deployment's node."""


@dataclass(frozen=True)
class Nodes:
    """A running cluster: `front` (the head) and `back`. A node resolves relative paths in its own folder."""

    address: str
    folders: dict[str, Path]
    jobs: str
    outputs: str
    back_port: int

    def of(self, pid: int) -> str:
        """Return the node that a process belongs to."""
        folder = Path(f"/proc/{pid}/cwd").resolve()
        return next(name for name, path in self.folders.items() if path == folder)


@pytest.fixture(scope="module")
def nodes(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, s3_server: S3Server
) -> Iterator[Nodes]:
    ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's socket paths have a maximum length.
    folders = {name: tmp_path_factory.mktemp(name).resolve() for name in ("front", "back")}
    database = PostgresServer(flush=False)
    jobs, outputs, back_port = database.create(), f"s3://{BUCKET}/several-nodes", free_port()
    environment = {
        **s3_server.environment,
        "JOBS_URL": jobs,
        "OUTPUT_BASE_PATH": outputs,
        "CHECKPOINTS_PATH": str(checkpoints),
        "WORKFLOWS_BASE_PATH": str(LORA.parent),
        "FETCH_ALLOW_HOSTS": "127.0.0.1",
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_MODE": "disabled",
    }
    cluster = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            patch.chdir(folders["front"])
            cluster.add_node(num_cpus=2, resources={"front": 1}, include_dashboard=False)
            patch.chdir(folders["back"])
            # Both nodes share one address here.
            ports = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(back_port)}
            cluster.add_node(num_cpus=2, resources={"back": 1}, env_vars=ports)
            yield Nodes(str(cluster.address), folders, jobs, outputs, back_port)
        finally:
            cluster.shutdown()
            database.close()
            shutil.rmtree(ray_folder, ignore_errors=True)


def placed_config(port: int) -> str:
    """Return the rendered config with each deployment on its node, as in operations.md."""
    config = yaml.safe_load(edited_config(["flux"], port))
    for application in config["applications"]:
        for deployment in application["deployments"]:
            place = PLACES[deployment["name"]]
            deployment["ray_actor_options"] = {"num_cpus": 0.5, "resources": {place: 0.01}}
    return yaml.safe_dump(config, sort_keys=False)


def test_a_job_crosses_the_nodes(nodes: Nodes, tmp_path: Path) -> None:
    port, data = free_port(), LORA.read_bytes()
    environment = {"RAY_ADDRESS": nodes.address, "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    with serving_site() as site, serve_run(placed_config(port), port, tmp_path, environment) as client:
        prompt = {"prompt": "a bridge", "width": 64, "height": 64, "sample_steps": 2, "seed": 1}
        requests = [
            {"model": "flux", "loras": [{"path": path}], "prompts": [prompt]}
            for path in (site.file("/lora", data), LORA.name)
        ]
        ids = [submit(client, request) for request in requests]
        for job_id in ids:
            assert finished(client, job_id)["status"] == "succeeded"

        queue = JobQueue(nodes.jobs)
        owners = [job.owner or "" for job in map(queue.get, ids) if job is not None]
        queue.close()
        assert [nodes.of(int(owner.split(":")[1])) for owner in owners] == ["back", "back"]
        assert {nodes.of(pid) for pid in replica_pids("gateway")} == {"front"}
        kept = f"var/lora_cache/files/{hashlib.sha256(data).hexdigest()}.safetensors"
        assert [(nodes.folders[name] / kept).exists() for name in ("front", "back")] == [False, True]

        with httpx.Client(base_url=f"http://127.0.0.1:{nodes.back_port}", timeout=30) as other:
            wait_until(lambda: _answers(other), 60, "the second node's proxy")
            pictures = [_picture(nodes, each, job_id) for each in (client, other) for job_id in ids]
        assert len(set(pictures)) == 1, "same LoRA and seed: same picture, from any source and for any client"


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _picture(nodes: Nodes, client: httpx.Client, job_id: str) -> bytes:
    (image,) = client.get(f"/v1/requests/{job_id}/result").json()["outputs"]["images"]
    assert image["file_path"].startswith(f"{nodes.outputs}/{job_id}/")
    content = httpx.get(image["url"]).raise_for_status().content
    assert hashlib.sha256(content).hexdigest() == image["sha256"]
    return content


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JOBS_URL", "sqlite:///var/jobs.db", r"set JOBS_URL to postgresql://"),
        ("OUTPUT_BASE_PATH", "file://var/outputs", r"set OUTPUT_BASE_PATH to s3://"),
    ],
)
def test_what_lives_on_one_disk_refuses_several_nodes(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    builds: list[Callable[[], object]] = [
        lambda: build_gateway(GatewayArgs()),
        lambda: build_models(ModelsArgs(models=("flux",))),
    ]
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        for build in builds:
            with pytest.raises(RuntimeError, match=message):
                build()
        monkeypatch.undo()
        for build in builds:
            build()
    finally:
        ray.shutdown()
