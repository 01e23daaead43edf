"""Replicas without Ray: claim loops in separate processes, and jobs for them."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TypeAlias

from cluster.jobs.model import NewJob
from cluster.jobs.queue import JobQueue
from cluster.objects.directory import DirectoryStore
from deployments.engine.engine import Engine
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec
from deployments.spec.lora_reference import parse
from deployments.worker.claiming import ClaimLoop
from deployments.worker.heartbeat import Heartbeat
from serve_app.cli.render import open_sources
from serve_app.settings import RenderArgs

MakeEngine: TypeAlias = Callable[[Path], Engine]
"""Returns a loaded engine for the checkpoints and LoRAs in a folder; must be a module-level function."""

SPAWN = multiprocessing.get_context("spawn")


def work(
    make: MakeEngine, folder: Path, url: str, age_bound_s: float, owner: str, loaded: Event, stop: Event
) -> None:
    """Run one replica of `flux`."""
    queue, store = JobQueue(url, age_bound_s=age_bound_s), DirectoryStore(folder / "outputs")
    loras, controls = open_sources(RenderArgs(loras=folder / "loras", lora_cache=folder / "cache"), store)
    heartbeat = Heartbeat(queue, owner, "flux", warm=lambda: loop.warm, lease_s=30)
    loop = ClaimLoop(make(folder), queue, store, heartbeat, owner=owner, loras=loras, controls=controls)
    heartbeat.start()
    loop.start()
    loop.loaded.wait()
    loaded.set()
    stop.wait()
    loop.drain(10)
    heartbeat.close()


@contextmanager
def workers(
    count: int, make: MakeEngine, folder: Path, url: str, age_bound_s: float = 60.0
) -> Iterator[None]:
    """Run some replicas; the block begins when all are loaded."""
    stop, loaded = SPAWN.Event(), [SPAWN.Event() for _ in range(count)]
    processes = [
        SPAWN.Process(
            target=work, args=(make, folder, url, age_bound_s, f"replica-{n}", event, stop), daemon=True
        )
        for n, event in enumerate(loaded)
    ]
    for process in processes:
        process.start()
    try:
        for event in loaded:
            assert event.wait(300), "a replica did not load"
        yield
    finally:
        stop.set()
        for process in processes:
            process.join()


def job_with(lora: str, prompt: PromptSpec) -> NewJob:
    """Return a job of one prompt with one LoRA."""
    spec = RenderSpec(model="flux", loras=(LoraSpec(path=parse(lora)),), prompts=(prompt,))
    return NewJob(id=str(uuid.uuid4()), model="flux", spec=spec.model_dump(mode="json"), adapter=spec.adapter)
