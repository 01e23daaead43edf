"""A real gateway on a loopback port, on its own SQLite file, output directory and LoRA root."""

from __future__ import annotations

import base64
import hashlib
import io
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from safetensors.numpy import save_file

from cluster.jobs.model import Claim, Job, JobState
from cluster.jobs.queue import JobQueue
from cluster.objects.directory import DirectoryStore
from deployments.spec.job import RenderSpec
from serve_app.admission.admit import admit
from serve_app.gateway.app import create_app
from serve_app.settings import GatewayArgs, Settings
from serve_app.wire.requests import InferenceRequest


def png(width: int = 24, height: int = 16, colour: tuple[int, int, int] = (200, 30, 90)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(width: int = 24, height: int = 16) -> str:
    return base64.b64encode(png(width, height)).decode()


def body(**changes: Any) -> dict[str, Any]:
    """Return a valid request; `prompt` changes its only prompt, `lora` its only LoRA, others the body."""
    request: dict[str, Any] = {
        "model": "flux",
        "loras": [{"path": "style.safetensors", **changes.pop("lora", {})}],
        "prompts": [{"prompt": "a red fox", **changes.pop("prompt", {})}],
    }
    return request | changes


def kontext_body(**prompt: Any) -> dict[str, Any]:
    """Return a valid request with one control image; the keywords change its prompt."""
    return body(model="flux_kontext", prompt={"ctrl_img": base64_png(), **prompt})


def save_pair(path: Path) -> None:
    """Write the smallest LoRA that a gateway admits."""
    pair = {"a.lora_A.weight": np.ones((2, 4), np.float32), "a.lora_B.weight": np.ones((4, 2), np.float32)}
    save_file(pair, path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA root for `admitted`."""
    folder = tmp_path_factory.mktemp("admission")
    save_pair(folder / "style.safetensors")
    return folder


def admitted(place: Path, request: dict[str, Any]) -> RenderSpec:
    """Admit a request without a gateway; return its resolved spec."""
    settings = Settings.model_validate({"loras": place})
    return admit(InferenceRequest.model_validate(request), settings, DirectoryStore(place / "outputs"))


@dataclass
class Service:
    """A running gateway; `queue` and `store` are separate handles to its database and output directory."""

    settings: GatewayArgs
    client: httpx.Client
    queue: JobQueue
    store: DirectoryStore

    @property
    def stored(self) -> tuple[int, frozenset[Path]]:
        """The number of rows, and the stored files."""
        file = self.settings.jobs.removeprefix("sqlite:///")
        connection = sqlite3.connect(file)
        rows = connection.execute("SELECT count(*) FROM jobs").fetchone()[0]
        connection.close()
        folder = Path(self.settings.outputs.removeprefix("file://"))
        return rows, frozenset(path for path in folder.rglob("*") if path.is_file())

    def post(self, request: dict[str, Any], key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.client.post("/v1/inference", json=request, headers=headers)

    def submit(self, request: dict[str, Any] | None = None, key: str | None = None) -> str:
        answer = self.post(request or body(), key)
        assert answer.status_code == 200, answer.text
        return answer.json()["request_id"]

    def status(self, job_id: str, **query: Any) -> dict[str, Any]:
        return self.client.get(f"/v1/requests/{job_id}/status", params=query).raise_for_status().json()

    def result(self, job_id: str, **query: Any) -> dict[str, Any]:
        return self.client.get(f"/v1/requests/{job_id}/result", params=query).raise_for_status().json()

    def claim(self, job_id: str, owner: str = "worker-1") -> Claim:
        """Claim the oldest job of the model as a worker does; it must be this job."""
        model = self.queue.get(job_id).model  # type: ignore[union-attr]
        claim = self.queue.claim(model, owner)
        assert claim is not None and claim.job.id == job_id
        return claim

    def publish(self, claim: Claim) -> None:
        """Record one picture per prompt and finish the job, as a worker does."""
        for index, prompt in enumerate(claim.job.spec["prompts"]):
            folder = f"{claim.job.id}/{claim.epoch}"
            data = png(prompt["width"], prompt["height"])
            self.store.put(f"{folder}/{index}.png", data, "image/png")
            self.store.put(f"{folder}/{index}.json", b'{"seed": 1}', "application/json")
            output = {
                "kind": "image",
                "format": "png",
                "width": prompt["width"],
                "height": prompt["height"],
                "seed": prompt["seed"],
                "key": f"{folder}/{index}.png",
                "manifest_key": f"{folder}/{index}.json",
                "sha256": hashlib.sha256(data).hexdigest(),
                "bytes": len(data),
            }
            self.queue.record_output(claim, index, output)
        result = {"inference_time": 1.5, "timings": {"render": 1.25}, "warnings": ["2 of 4 modules matched."]}
        self.queue.finish(claim, JobState.SUCCEEDED, result=result)


@contextmanager
def listening(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Run an application in uvicorn on `port` (0: any free port); yield its URL."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="on", log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def running(settings: GatewayArgs, port: int = 0) -> Iterator[httpx.Client]:
    """Run the gateway with its lifespan; yield a client."""
    with listening(create_app(settings), port) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@contextmanager
def rendering(
    service: Service, model: str = "flux", end: Callable[[Claim], None] | None = None
) -> Iterator[list[Job]]:
    """Act as the worker of a model until the block ends: publish each job's pictures at once, or call `end`.

    Yields the list of claimed jobs.
    """
    over = threading.Event()
    claimed: list[Job] = []

    def work() -> None:
        while not over.wait(0.02):
            while claim := service.queue.claim(model, "worker-1"):
                claimed.append(claim.job)
                (end or service.publish)(claim)

    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(work)
        try:
            yield claimed
        finally:
            over.set()
            worker.result()


@contextmanager
def serving(folder: Path, port: int = 0, **changes: Any) -> Iterator[Service]:
    """Run a gateway on stores and a LoRA root in `folder`; an earlier gateway may have created them."""
    loras = folder / "loras"
    loras.mkdir(exist_ok=True)
    save_pair(loras / "style.safetensors")
    settings = GatewayArgs.model_validate(
        {
            "jobs": f"sqlite:///{folder}/jobs.db",
            "outputs": f"file://{folder}/outputs",
            "loras": loras,
            **changes,
        }
    )
    with ExitStack() as stack:
        client = stack.enter_context(running(settings, port))
        queue = JobQueue(settings.jobs)
        stack.callback(queue.close)
        yield Service(settings, client, queue, DirectoryStore(folder / "outputs"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One gateway for all tests of a module; no test may leave a claimable job behind."""
    with serving(tmp_path_factory.mktemp("service")) as running_service:
        yield running_service


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Service]:
    """The test's own gateway, with an empty table."""
    with serving(tmp_path) as running_service:
        yield running_service
