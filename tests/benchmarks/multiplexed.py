"""The same load on `@serve.multiplexed`, Ray Serve's own placement of many small models."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from deployments.engine.job import Unwatched
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora
from deployments.spec.job import PromptSpec
from tests.benchmarks.slowed import RESIDENT, slow_engine


@serve.deployment(max_ongoing_requests=1, ray_actor_options={"num_cpus": 0})
class Multiplexed:
    """Replicas with the same engine; Serve decides which replica gets a LoRA's request."""

    def __init__(self, folder: Path) -> None:
        self._loras = folder / "loras"
        self._engine = slow_engine(folder)
        self._loaded = False

    @serve.multiplexed(max_num_models_per_replica=RESIDENT)
    async def adapter(self, name: str) -> LoraFile:
        self._loaded, file = True, open_lora(self._loras, name)
        await asyncio.to_thread(self._engine.use, [(file, 1.0)])
        return file

    async def __call__(self, prompt: PromptSpec) -> bool:
        """Render the prompt; return True if the LoRA was loaded here already."""
        self._loaded = False
        file = await self.adapter(serve.get_multiplexed_model_id())  # pyright: ignore[reportCallIssue]
        await asyncio.to_thread(self._render, file, prompt)
        return not self._loaded

    def _render(self, file: LoraFile, prompt: PromptSpec) -> None:
        self._engine.use([(file, 1.0)])
        self._engine.render(prompt, [], Unwatched())


@contextmanager
def multiplexed(folder: Path, replicas: int) -> Iterator[Any]:
    """Run the deployment on its own Ray; yield its handle."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    # Ray's socket paths have a maximum length, so its folder needs a short path.
    ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=ray_folder, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        yield serve.run(Multiplexed.options(num_replicas=replicas).bind(folder), route_prefix=None)
    finally:
        serve.shutdown()
        ray.shutdown()


class Callers:
    """One thread per request in flight. Records for each answer whether it was a hit, and its seconds."""

    def __init__(self, handle: Any, prompt: PromptSpec) -> None:
        self._handle = handle
        self._prompt = prompt
        self._threads: list[threading.Thread] = []
        self._outcomes: dict[int, tuple[bool, float]] = {}

    def submit(self, lora: str) -> None:
        """Send a request."""
        number = len(self._threads)

        def call() -> None:
            begun = time.monotonic()
            hit = self._handle.options(multiplexed_model_id=lora).remote(self._prompt).result()
            self._outcomes[number] = hit, time.monotonic() - begun

        self._threads.append(threading.Thread(target=call))
        self._threads[-1].start()

    def outcomes(self) -> Sequence[tuple[bool, float]]:
        """Wait for all answers; return (hit, seconds) of each, in the order of the requests."""
        for thread in self._threads:
            thread.join()
        return [self._outcomes[number] for number in range(len(self._threads))]
