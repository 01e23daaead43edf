"""Gateway and worker on one S3 store: control images in, pictures out by presigned URLs."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from cluster.jobs.queue import JobQueue
from cluster.objects import s3
from cluster.objects.opening import open_store
from cluster.objects.store import ObjectStore
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine
from deployments.worker import publish
from deployments.worker.claiming import ClaimLoop
from deployments.worker.heartbeat import Heartbeat
from serve_app.cli.render import open_sources
from serve_app.settings import GatewayArgs
from tests.parity.cases import FOLDER
from tests.serve_app.conftest import base64_png, body, png, running
from tests.support.s3 import SECRET, Proxy, refused
from tests.support.service import finished, submit

MODEL = "flux_kontext"


@pytest.fixture
def settings(tmp_path: Path, s3_url: str) -> GatewayArgs:
    shutil.copytree(FOLDER / MODEL / "lora", tmp_path / "loras")
    return GatewayArgs.model_validate(
        {"jobs": f"sqlite:///{tmp_path}/jobs.db", "outputs": s3_url, "loras": tmp_path / "loras"}
    )


@pytest.fixture
def client(settings: GatewayArgs) -> Iterator[httpx.Client]:
    with running(settings) as made:
        yield made


@pytest.fixture
def worker(settings: GatewayArgs, checkpoints: Path) -> Iterator[ClaimLoop]:
    """A replica without Ray; the test starts it."""
    with closing(JobQueue(settings.jobs)) as queue:
        loop: ClaimLoop
        heartbeat = Heartbeat(queue, "worker@test:1:a", MODEL, warm=lambda: loop.warm, lease_s=30.0)
        store = open_store(settings.outputs)
        loras, controls = open_sources(settings, store)
        loop = ClaimLoop(
            Engine(CATALOG[MODEL], Checkpoints(checkpoints, None), device="cpu"),
            queue,
            store,
            heartbeat,
            owner="worker@test:1:a",
            loras=loras,
            controls=controls,
        )
        heartbeat.start()
        yield loop
        loop.drain(0)
        heartbeat.close()


@pytest.fixture
def store(settings: GatewayArgs) -> ObjectStore:
    return open_store(settings.outputs)


def edit_request(**changes: object) -> dict[str, object]:
    prompt = {"ctrl_img": base64_png(64, 64), "width": 64, "height": 64, "sample_steps": 2, "seed": 1}
    return body(
        model=MODEL, lora={"path": "tiny_a.safetensors"}, prompt=prompt, output_format="png", **changes
    )


def control_key() -> str:
    digest = hashlib.sha256(png(64, 64)).hexdigest()
    return f"inputs/sha256/{digest[:2]}/{digest}"


def test_a_picture_by_way_of_s3(
    client: httpx.Client,
    worker: ClaimLoop,
    store: ObjectStore,
    settings: GatewayArgs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    job_id = submit(client, edit_request())
    assert store.get(control_key()) == png(64, 64)
    worker.start()
    assert finished(client, job_id)["status"] == "succeeded"
    result_url = f"/v1/requests/{job_id}/result"
    (image,) = client.get(result_url).json()["outputs"]["images"]
    path = image["file_path"]
    assert path.startswith(f"{settings.outputs}/{job_id}/1/0-") and path.endswith(".png")

    answer = httpx.get(image["url"])
    assert answer.headers["content-type"] == "image/png"
    assert len(answer.content) == image["bytes"]
    assert hashlib.sha256(answer.content).hexdigest() == image["sha256"]
    assert np.asarray(Image.open(io.BytesIO(answer.content))).shape == (64, 64, 3)
    manifest = httpx.get(image["manifest_url"])
    assert manifest.headers["content-type"] == "application/json"
    assert manifest.json()["sha256"] == image["sha256"]

    key = path.removeprefix(f"{settings.outputs}/")
    for target in (f"/outputs/{key}", f"/outputs/{control_key()}"):
        refusal = client.get(target)
        assert refusal.status_code == 404
        assert refusal.json()["detail"]["error"]["code"] == "OUTPUT_NOT_FOUND"
    assert httpx.get(image["url"].partition("?")[0]).is_client_error, "the bucket is private"

    signature = urlsplit(image["url"]).query.rpartition("=")[2]
    kept = Path(settings.jobs.removeprefix("sqlite:///")).parent
    table = b"".join(file.read_bytes() for file in kept.glob("jobs.db*"))
    assert key.encode() in table
    # Only the test's own client logs as httpx.
    logged = [text.getMessage() for text in caplog.records if text.name != "httpx"]
    for secret in (signature, "X-Amz-", SECRET):
        assert secret.encode() not in table and secret not in str(logged)


def test_a_control_image_that_is_gone_fails_the_job_with_its_code(
    client: httpx.Client, worker: ClaimLoop, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "RETRY_DELAY_S", 0.1)
    job_id = submit(client, edit_request())
    store.delete("inputs")
    worker.start()
    status = finished(client, job_id)
    assert (status["status"], status["error_code"], status["attempts"]) == ("failed", "OUTPUT_STORE_ERROR", 3)


def test_a_store_that_is_away_is_a_503_and_no_job(
    s3_proxy: Proxy, settings: GatewayArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    with running(settings) as client, closing(JobQueue(settings.jobs)) as queue:
        s3_proxy.faults.extend([refused] * 2)
        answer = client.post("/v1/inference", json=edit_request())
        assert answer.status_code == 503
        assert answer.json()["detail"]["error"]["code"] == "STORE_UNAVAILABLE"
        assert queue.claim(MODEL, "worker") is None
        submit(client, edit_request())
        assert queue.claim(MODEL, "worker") is not None
