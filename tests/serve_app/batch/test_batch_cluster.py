"""Batches on a real cluster: the notebook with Ray Client, a killed process, Ray Data, a wrong version."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
from nbclient import NotebookClient

from serve_app.batch.batch import Batch
from serve_app.client import LoraServe, Refused
from tests.faults.service import kill_all
from tests.parity.cases import FOLDER
from tests.support.service import edited_config, free_port, serve_run, wait_until

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[3] / "docs" / "notebooks" / "batch.ipynb"

SMALL: dict[str, Any] = {"model": "flux", "lora": "flux.safetensors", "sample_steps": 2}

ROWS = [{"prompt": f"road {index}", "width": 64, "height": 64} for index in range(12)]


@dataclass(frozen=True)
class Cluster:
    client: LoraServe
    url: str
    ray_client: str
    address: str
    environment: dict[str, str]

    def start(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Run Python code in a new process that uses this cluster."""
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, env=self.environment, text=True, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Iterator[Cluster]:
    """A cluster started with `ray start`, and the service on it."""
    folder = tmp_path_factory.mktemp("cluster")
    loras = folder / "loras"
    loras.mkdir()
    shutil.copy(FOLDER / "flux" / "lora" / "tiny_a.safetensors", loras / "flux.safetensors")
    http, head, client = free_port(), free_port(), free_port()
    # Ray's socket paths have a maximum length, so its folder needs a short path.
    ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_MODE": "disabled",
        "BASE_URL": f"http://127.0.0.1:{http}",
        "DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "JOBS_URL": f"sqlite:///{folder}/jobs.db",
        "OUTPUT_BASE_PATH": f"file://{folder}/outputs",
        "WORKFLOWS_BASE_PATH": str(loras),
        "CHECKPOINTS_PATH": str(checkpoints),
    }
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={head}"]
    command += [f"--ray-client-server-port={client}", "--include-dashboard=false", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    address = f"127.0.0.1:{head}"
    config = edited_config(["flux"], http, max_replicas=1)
    with (folder / "ray.log").open("wb") as log:
        node = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "ray.log").read_bytes(), 180, "the cluster")
        own = {**environment, "RAY_ADDRESS": address}
        with serve_run(config, http, folder, own), LoraServe(f"http://127.0.0.1:{http}") as service:
            yield Cluster(
                service, f"http://127.0.0.1:{http}", f"ray://127.0.0.1:{client}", address, environment
            )
    finally:
        kill_all(node.pid)
        node.wait()
        shutil.rmtree(ray_folder, ignore_errors=True)


def test_the_notebook_runs_by_ray_client_and_its_batch_is_found_by_http(
    cluster: Cluster, tmp_path: Path
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kernel = NotebookClient(notebook, timeout=300, kernel_name="python3")
    kernel.execute(env={**cluster.environment, "SERVICE": cluster.ray_client})
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown), "the contact sheet"
    (named,) = [
        text for output in shown if (text := output.get("data", {}).get("text/plain", ""))[:6] == "Batch("
    ]
    found = Batch(cluster.client, named.split("'")[1])
    frame = found.frame()
    assert list(frame["status"]) == ["succeeded"] * 8
    assert list(frame["seed"]) == [1, 2] * 4 and list(frame["multiplier"]) == [0.5, 0.5, 1.0, 1.0] * 2
    files = [file for result in found.results() for file in result.files if file is not None]
    assert len({file.sha256 for file in files}) == 8, "each multiplier and seed must give a different picture"
    for index, file in enumerate(files):
        cluster.client.download(file, tmp_path / str(index))


SUBMIT = """
import json, sys
from serve_app.batch.batch import Batch
from serve_app.client import LoraServe
Batch(LoraServe(sys.argv[1]), sys.argv[2]).submit(sys.argv[3], chunk=1, **json.loads(sys.argv[4]))
"""


def test_a_process_that_dies_in_the_middle_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(json.dumps({**row, "seed": 7}) for row in ROWS * 20))
    batch = Batch(cluster.client)

    def half() -> bool:
        try:
            return batch.counts().total >= 5
        except Refused:
            return False

    process = cluster.start(SUBMIT, cluster.url, batch.id, str(table), json.dumps(SMALL))
    wait_until(half, 120, "some submissions")
    process.kill()
    process.wait()
    left = batch.counts().total
    assert left < 20 * len(ROWS), "the process was killed too late"
    # The stored jobs run on, and the same call again adds the rest.
    rows = [{**row, "seed": 7} for row in ROWS * 20][: left + 5]
    assert (
        Batch(cluster.client, batch.id).submit(rows, chunk=1, progress=False, **SMALL).counts().total
        == left + 5
    )
    assert batch.wait(timeout_s=300, progress=False).succeeded == left + 5
    assert [result.prompts[0].prompt for result in batch.results()] == [row["prompt"] for row in rows]


MAP = """
import json, sys
import ray
from serve_app.batch.batch import map_batches
ray.init(sys.argv[1], log_to_driver=False)
rows = [{**row, "note": index} for index, row in enumerate(json.loads(sys.argv[2]))]
dataset = ray.data.from_items(rows, override_num_blocks=2)
print(json.dumps(map_batches(dataset, chunk=4, in_flight=2, **json.loads(sys.argv[3])).take_all()))
"""


def test_a_ray_dataset_comes_back_with_urls(cluster: Cluster) -> None:
    rows = ROWS[:10]
    process = cluster.start(MAP, cluster.address, json.dumps(rows), json.dumps(SMALL))
    printed, _ = process.communicate(timeout=240)
    made = sorted(json.loads(printed.splitlines()[-1]), key=lambda row: row["note"])
    assert [row["prompt"] for row in made] == [row["prompt"] for row in rows]
    assert {(row["status"], row["error"]) for row in made} == {("succeeded", None)}
    assert all(row["url"].startswith(f"{cluster.url}/outputs/{row['request_id']}/") for row in made)


CONNECT = """
import sys
import ray
ray.__version__ = "2.59.0"
from serve_app.client import LoraServeError
from serve_app.client.ray_client import connect
try:
    connect(sys.argv[1])
except LoraServeError as error:
    print(error, ray.is_initialized())
"""


def test_a_cluster_of_another_version_is_told_with_what_to_install(cluster: Cluster) -> None:
    process = cluster.start(CONNECT, cluster.ray_client)
    printed, _ = process.communicate(timeout=120)
    assert "VERSION_MISMATCH" in printed and printed.strip().endswith("False")
    assert f'pip install "ray[client,serve]=={ray.__version__}"' in printed


CONNECT_TWICE = """
import sys
from ray.util.client.worker import Worker
from serve_app.client.ray_client import connect
start, calls = Worker._server_init, []
def fail_first(self, *args):
    calls.append(args)
    if len(calls) == 1:
        raise ConnectionAbortedError("Initialization failure from server: the process is a zombie")
    return start(self, *args)
Worker._server_init = fail_first
print(len(connect(sys.argv[1]).models()) > 0, len(calls))
"""


def test_a_ray_client_whose_process_on_the_head_died_connects_again(cluster: Cluster) -> None:
    process = cluster.start(CONNECT_TWICE, cluster.ray_client)
    printed, _ = process.communicate(timeout=120)
    assert printed.strip().endswith("True 2")


def test_the_id_of_a_batch_is_anybodys_choice(cluster: Cluster) -> None:
    batch_id = str(uuid.uuid4())
    with LoraServe(cluster.url) as other:
        Batch(other, batch_id).submit(ROWS[:1], progress=False, **SMALL)
    assert Batch(cluster.client, batch_id).wait(timeout_s=120, progress=False).succeeded == 1
