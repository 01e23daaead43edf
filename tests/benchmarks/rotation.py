"""Throughput with rotating LoRAs, on one and two replicas; run by `tests.benchmarks.lora`.

Bursts of 64 jobs rotate through 1, 2, 8 or 64 LoRAs, on the real claim loop, table and engine with a tiny
FLUX.1. A device has room for 16 LoRAs, so with 64 they come from host memory. Jobs are claimed in the normal
order, LoRAs that the replica holds first. The kinds of burst take turns, so that a busy machine slows all.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import torch

from cluster.jobs.queue import JobQueue
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine
from deployments.engine.tiny import write_tiny_checkpoints, write_tiny_lora
from deployments.spec.job import PromptSpec
from tests.benchmarks.replicas import job_with, workers

ROTATIONS = (1, 2, 8, 64)
BURST = 64
ROUNDS = 5
ROOM = 16
"""How many LoRAs the device holds."""

PROMPT = PromptSpec(prompt="a red fox", neg="", width=96, height=96, steps=4, guidance=4.0, seed=1)


def engine(device: str, folder: Path) -> Engine:
    """Return a loaded engine with room for `ROOM` LoRAs on the device, and for all in host memory."""
    torch.set_num_threads(1)
    # Half the size of the float32 files.
    room = ROOM * 2 * (folder / "loras" / "0.safetensors").stat().st_size
    checkpoints = Checkpoints(folder / "checkpoints", None)
    made = Engine(CATALOG["flux"], checkpoints, device=device, adapter_bytes=room)
    made.load()
    return made


def burst(queue: JobQueue, loras: int) -> float:
    """Submit a burst that rotates through `loras` LoRAs; return jobs per second."""
    begun = time.perf_counter()
    new = [job_with(f"{n % loras}.safetensors", PROMPT) for n in range(BURST)]
    ids = {job.id for job in queue.submit(new)}
    while len(queue.finished(ids)) < BURST:
        time.sleep(0.05)
    took_s = time.perf_counter() - begun
    assert all(job.state == "succeeded" for job in queue.list(None, limit=BURST))
    return BURST / took_s


def measure_rotations(folder: Path, replicas: int, device: str) -> dict[int, float]:
    """Return the median jobs per second for each number of LoRAs, after one warm-up burst of each."""
    write_tiny_checkpoints(folder / "checkpoints")
    for seed in range(max(ROTATIONS)):
        write_tiny_lora(folder / "loras" / f"{seed}.safetensors", seed)
    url = f"sqlite:///{folder}/jobs.db"
    queue = JobQueue(url)
    with workers(replicas, partial(engine, device), folder, url):
        rounds = [{loras: burst(queue, loras) for loras in ROTATIONS} for _ in range(ROUNDS + 1)]
    queue.close()
    return {loras: statistics.median(each[loras] for each in rounds[1:]) for loras in ROTATIONS}
