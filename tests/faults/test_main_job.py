"""Accepted jobs survive the death of their worker and the gateway, rolling updates, scaling to zero."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.jobs import TRANSITIONS, JobState
from cluster.queue import JobQueue
from deployments.tiny import write_tiny_lora
from tests.service import (
    edited_config,
    finished,
    free_port,
    redeploy,
    replica_pids,
    serve_run,
    submit,
    wait_until,
)

pytestmark = pytest.mark.slow

LEASE_S = 4.0


@dataclass
class Service:
    client: httpx.Client
    queue: JobQueue
    folder: Path
    port: int

    def worker_of(self, job_id: str) -> int | None:
        """The pid of the worker that runs the job now: owners name it."""
        job = self.queue.get(job_id)
        if job is None or job.state is not JobState.IN_PROGRESS or job.owner is None:
            return None
        return int(job.owner.split(":")[1])

    def gateway(self) -> int:
        return wait_until(lambda: replica_pids("gateway"), 30, "the gateway's start")[0]

    def running(self, job_id: str) -> Any:
        """Wait until the job has made a few steps."""

        def probe() -> Any:
            progress = self.client.get(f"/v1/requests/{job_id}/status").json()["progress"]
            return progress is not None and progress["step"] >= 2 and progress

        return wait_until(probe, 120, "the job's start")

    def config(self, **options: Any) -> str:
        args = {"lease_s": LEASE_S, "adapter_bytes": options.pop("adapter_bytes", 1 << 30)}
        return edited_config(
            ["flux"],
            self.port,
            args=args,
            options={"graceful_shutdown_timeout_s": 120.0, **options},
            max_replicas=1,
            downscale_to_zero_delay_s=5.0,
            downscale_delay_s=5.0,
        )

    def check_history(self, job_id: str) -> None:
        """Every change in the job's history is a legal one, and it ended once."""
        events = self.queue.events(job_id)
        states = [event.state for event in events]
        assert states[0] is JobState.IN_QUEUE
        for before, after in pairwise(states):
            assert after in TRANSITIONS[before], states
        assert sum(state.terminal for state in states) == 1
        assert [event.epoch for event in events] == sorted(event.epoch for event in events)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("faults")
    write_tiny_lora(folder / "loras" / "a.safetensors", seed=1)
    write_tiny_lora(folder / "loras" / "b.safetensors", seed=2)
    environment = {
        "CHECKPOINTS_PATH": str(checkpoints),
        "WORKFLOWS_BASE_PATH": str(folder / "loras"),
        "OUTPUT_BASE_PATH": str(folder / "outputs"),
        "JOBS_URL": f"sqlite:///{folder}/jobs.db",
    }
    port = free_port()
    made = Service(client=None, queue=None, folder=folder, port=port)  # type: ignore[arg-type]
    with serve_run(made.config(), port, folder, environment) as client:
        made.client, made.queue = client, JobQueue(environment["JOBS_URL"])
        yield made
        made.queue.close()


def long_body(lora: str = "a", steps: int = 100, prompts: int = 1) -> dict[str, Any]:
    prompt = {"prompt": "a long road", "width": 512, "height": 512, "sample_steps": steps}
    return {"model": "flux", "loras": [{"path": f"{lora}.safetensors"}], "prompts": [prompt] * prompts}


def short_body(lora: str = "a", seed: int = 1) -> dict[str, Any]:
    prompt = {"prompt": "a short road", "width": 64, "height": 64, "sample_steps": 2, "seed": seed}
    return {"model": "flux", "loras": [{"path": f"{lora}.safetensors"}], "prompts": [prompt]}


def test_a_killed_worker_loses_no_job(service: Service) -> None:
    job_id = submit(service.client, long_body())
    waiting = [submit(service.client, short_body("b", seed)) for seed in range(3)]
    service.running(job_id)
    worker = service.worker_of(job_id)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    status = finished(service.client, job_id)
    assert (status["status"], status["attempts"]) == ("succeeded", 2)
    for other in waiting:
        assert finished(service.client, other)["status"] == "succeeded"
    for each in (job_id, *waiting):
        service.check_history(each)
    result = service.client.get(f"/v1/requests/{job_id}/result").json()
    image = result["outputs"]["images"][0]
    assert f"/{job_id}/2/" in image["url"]
    assert len(service.client.get(image["url"]).content) == image["bytes"]


def test_a_killed_gateway_loses_no_job(service: Service) -> None:
    job_id = submit(service.client, long_body("b"))
    accepted = [submit(service.client, short_body("a", seed)) for seed in range(5)]
    gateway = service.gateway()
    os.kill(gateway, signal.SIGKILL)

    def answers() -> bool:
        try:
            return service.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(lambda: [pid for pid in replica_pids("gateway") if pid != gateway], 60, "a new gateway")
    wait_until(answers, 60, "the gateway's return")
    for each in (job_id, *accepted):
        status = finished(service.client, each)
        assert (status["status"], status["attempts"]) == ("succeeded", 1)
        service.check_history(each)


def test_a_rolling_update_lets_the_running_job_finish(service: Service) -> None:
    job_id = submit(service.client, long_body())
    service.running(job_id)
    before = service.worker_of(job_id)
    redeploy(service.config(adapter_bytes=1 << 29), service.folder)
    status = finished(service.client, job_id)
    assert (status["status"], status["attempts"]) == ("succeeded", 1)
    again = submit(service.client, long_body("b", steps=40))
    service.running(again)
    assert service.worker_of(again) != before
    assert finished(service.client, again)["status"] == "succeeded"
    service.check_history(job_id)


def test_too_little_grace_releases_the_job_uncounted(service: Service) -> None:
    def config(adapter_bytes: int) -> str:
        return service.config(adapter_bytes=adapter_bytes, graceful_shutdown_timeout_s=4.0)

    before = set(replica_pids("flux"))
    redeploy(config(1 << 28), service.folder)
    wait_until(lambda: not before & set(replica_pids("flux")), 60, "the end of the replicas with much grace")
    job_id = submit(service.client, long_body(steps=150, prompts=5))
    service.running(job_id)
    redeploy(config(1 << 27), service.folder)
    status = finished(service.client, job_id)
    assert (status["status"], status["attempts"]) == ("succeeded", 1)
    assert max(event.epoch for event in service.queue.events(job_id)) == 2
    service.check_history(job_id)


def test_an_idle_model_goes_to_zero_and_comes_back(service: Service) -> None:
    wait_until(lambda: not replica_pids("flux"), 90, "scaling to zero")
    job_id = submit(service.client, short_body())
    assert finished(service.client, job_id)["status"] == "succeeded"
    assert replica_pids("flux")
