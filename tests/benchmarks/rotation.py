"""What a rotation of LoRAs costs in throughput, on one replica and on two; run by `tests.benchmarks.lora`.

Bursts of 64 jobs with 1, 2, 8 and 64 LoRAs in turns, on the real claim loop, table and engine with a tiny
FLUX.1. A device has room for 16 of the LoRAs, so 64 come from host memory. The order is the product's own:
claims go to the LoRAs that a replica holds. Bursts of each kind take turns, so that a busy machine slows all.
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
    # Half of float32 in the files.
    room = ROOM * 2 * (folder / "loras" / "0.safetensors").stat().st_size
    checkpoints = Checkpoints(folder / "checkpoints", None)
    made = Engine(CATALOG["flux"], checkpoints, device=device, adapter_bytes=room)
    made.load()
    return made


def burst(queue: JobQueue, loras: int) -> float:
    """Submit a burst with so many LoRAs in turns; return jobs per second."""
    begun = time.perf_counter()
    new = [job_with(f"{n % loras}.safetensors", PROMPT) for n in range(BURST)]
    ids = {job.id for job in queue.submit(new)}
    while len(queue.finished(ids)) < BURST:
        time.sleep(0.05)
    took_s = time.perf_counter() - begun
    assert all(job.state == "succeeded" for job in queue.list(None, limit=BURST))
    return BURST / took_s


def measure_rotations(folder: Path, replicas: int, device: str) -> dict[int, float]:
    """Return median jobs per second for each number of LoRAs, after one burst of each that does not count."""
    write_tiny_checkpoints(folder / "checkpoints")
    for seed in range(max(ROTATIONS)):
        write_tiny_lora(folder / "loras" / f"{seed}.safetensors", seed)
    url = f"sqlite:///{folder}/jobs.db"
    queue = JobQueue(url)
    with workers(replicas, partial(engine, device), folder, url):
        rounds = [{loras: burst(queue, loras) for loras in ROTATIONS} for _ in range(ROUNDS + 1)]
    queue.close()
    return {loras: statistics.median(each[loras] for each in rounds[1:]) for loras in ROTATIONS}
