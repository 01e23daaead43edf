"""Overhead of the service over the engine: `python -m tests.benchmarks.jobs`.

Compares one warm replica behind real HTTP with the same engine called in a plain loop, on tiny FLUX
checkpoints. Both take turns in one run, so that a busy machine slows both. The last line is one JSON object:

- `job_over_loop`: median submit-to-succeeded of a 64x64 two-step job over the loop's median;
- `burst_over_loop`: jobs per second of a burst of 40 mixing two LoRAs over the loop's;
- `alternating_over_one`: two alternating resident LoRAs over one LoRA, on jobs of about a second;
- `queue_to_start_ms`: median from commit to claim on the idle warm replica.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from cluster.jobs.queue import JobQueue
from cluster.objects.directory import DirectoryStore
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine
from deployments.engine.job import Report, Unwatched, render_job
from deployments.engine.tiny import write_tiny_checkpoints, write_tiny_lora
from serve_app.admission.admit import admit
from serve_app.cli.render import open_sources
from serve_app.settings import Settings
from serve_app.wire.requests import InferenceRequest
from tests.support.service import edited_config, finished, free_port, serve_run, submit

LORAS = ("a.safetensors", "b.safetensors")
ROUNDS = 25
BURST = 40


class Loop:
    """The engine called in a plain loop: the cost of a job without the service."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # Ray sets this for a worker with half a CPU.
        self._store = DirectoryStore(folder / "loop")
        self._settings = Settings(loras=folder / "loras")
        self._engine = Engine(CATALOG["flux"], Checkpoints(folder / "checkpoints", None), device="cpu")
        self._engine.load()

    def render(self, body: dict[str, Any]) -> float:
        """Render one request; return the seconds that took."""
        spec = admit(InferenceRequest.model_validate(body), self._settings, self._store)
        loras, controls = open_sources(self._settings, self._store)
        started = time.perf_counter()
        for _ in render_job(
            self._engine,
            spec,
            loras=loras,
            controls=controls,
            observer=Unwatched(),
            report=Report(),
        ):
            pass
        return time.perf_counter() - started


def body(lora: str, seed: int, *, size: int = 64, steps: int = 2) -> dict[str, Any]:
    prompt = {"prompt": "a red fox", "width": size, "height": size, "sample_steps": steps, "seed": seed}
    return {"model": "flux", "loras": [{"path": lora}], "prompts": [prompt]}


def through_service(client: httpx.Client, request: dict[str, Any]) -> tuple[float, str]:
    """Submit one job and wait for it; return seconds and the job's id."""
    started = time.perf_counter()
    job_id = submit(client, request)
    assert finished(client, job_id)["status"] == "succeeded"
    return time.perf_counter() - started, job_id


def burst(client: httpx.Client, requests: Sequence[dict[str, Any]]) -> float:
    started = time.perf_counter()
    for job_id in [submit(client, request) for request in requests]:
        assert finished(client, job_id)["status"] == "succeeded"
    return time.perf_counter() - started


def measure(client: httpx.Client, loop: Loop, queue: JobQueue) -> dict[str, float]:
    for lora in LORAS:  # Warm both sides, both adapters.
        loop.render(body(lora, 0))
        through_service(client, body(lora, 0))
    jobs, loops, starts = [], [], []
    for seed in range(ROUNDS):
        request = body(LORAS[0], seed)
        loops.append(loop.render(request))
        seconds, job_id = through_service(client, request)
        jobs.append(seconds)
        job = queue.get(job_id)
        assert job is not None and job.started_at is not None
        starts.append(job.started_at - job.created_at)
    mixed = [body(LORAS[seed % 2], seed) for seed in range(BURST)]
    loop_s = sum(loop.render(request) for request in mixed)
    burst_s = burst(client, mixed)
    one, alternating = [], []
    for seed in range(6):
        one.append(through_service(client, body(LORAS[0], seed, size=256, steps=40))[0])
    for seed in range(6):
        alternating.append(through_service(client, body(LORAS[seed % 2], seed, size=256, steps=40))[0])
    job, plain = statistics.median(jobs), statistics.median(loops)
    return {
        "job_ms": 1000 * job,
        "loop_ms": 1000 * plain,
        "job_over_loop": job / plain,
        "queue_to_start_ms": 1000 * statistics.median(starts),
        "burst_jobs_per_s": BURST / burst_s,
        "loop_jobs_per_s": BURST / loop_s,
        "burst_over_loop": loop_s / burst_s,
        "one_s": statistics.median(one),
        "alternating_s": statistics.median(alternating),
        "alternating_over_one": statistics.median(alternating) / statistics.median(one),
    }


def main() -> None:
    """Measure all pairs, draw the table, print the JSON line."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tiny_checkpoints(folder / "checkpoints")
        for seed, name in enumerate(LORAS):
            write_tiny_lora(folder / "loras" / name, seed=seed)
        environment = {
            "CHECKPOINTS_PATH": f"{folder}/checkpoints",
            "WORKFLOWS_BASE_PATH": f"{folder}/loras",
            "OUTPUT_BASE_PATH": f"{folder}/outputs",
            "JOBS_URL": f"sqlite:///{folder}/jobs.db",
        }
        port = free_port()
        config = edited_config(["flux"], port, max_replicas=1)
        with serve_run(config, port, folder, environment) as client:
            figures = measure(client, Loop(folder), JobQueue(environment["JOBS_URL"]))
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
