"""The Serve deployment of one model id. Its replicas claim jobs from the job table and answer no calls.

Ray Serve starts, scales, checks and drains replicas. Jobs are stored in the table, so none is lost when a
replica dies. This module imports no torch, because the builder, the controller and the `serve` command line
import it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid

from ray import serve

from cluster.databases.database import jobs_url
from cluster.jobs.opening import open_queue
from cluster.net.fetcher import Fetcher
from cluster.net.urls import parse_hosts
from cluster.objects.opening import open_store
from cluster.telemetry import configure_logging
from deployments.settings import WorkerSettings
from deployments.worker.heartbeat import Heartbeat

RELEASE_MARGIN_S = 30.0
"""Seconds before the end of the grace period at which a draining replica releases its running job."""


class Worker:
    """One replica: a warm pipeline of `model` and the threads that claim, render, publish and beat."""

    async def __init__(self, model: str, settings: WorkerSettings) -> None:  # type: ignore[misc]
        configure_logging()
        self._owner = f"{model}@{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._loop: ClaimLoop | None = None
        options = {"lease_s": settings.lease_s, "run_timeout_s": settings.inference_timeout_s}
        self._queue = await asyncio.to_thread(open_queue, jobs_url(settings.jobs), **options)
        self._heartbeat = Heartbeat(
            self._queue,
            self._owner,
            model,
            warm=lambda: self._loop.warm if self._loop else (),
            lease_s=settings.lease_s,
        )
        # Torch and diffusers take seconds to import; the autoscaling policy must see the replica before that.
        self._heartbeat.start()
        from deployments.engine.control_images import Controls
        from deployments.engine.engine import Engine
        from deployments.loras.sources.loras import Loras
        from deployments.worker.claiming import ClaimLoop

        # Torch reads this at its first compilation. Keep a value that the operator has set.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.compile_cache.absolute()))
        fetcher = Fetcher(parse_hosts(settings.fetch_hosts))
        store = open_store(settings.outputs)
        self._loop = ClaimLoop(
            Engine.of(model, settings),
            self._queue,
            store,
            self._heartbeat,
            owner=self._owner,
            loras=Loras.of(settings, fetcher),
            controls=Controls(store, fetcher, settings.max_image_pixels),
        )
        self._loop.start()
        # Serve counts the replica as running once this returns; a rolling update keeps the old one till then.
        await asyncio.to_thread(self._loop.loaded.wait)

    def check_health(self) -> None:
        """Raise `RuntimeError` if no lease is renewed any more; a stuck or failed loop ends the process."""
        if not self._heartbeat.alive:
            raise RuntimeError("the heartbeat thread has ended")

    async def __del__(self) -> None:
        """Drain: stop claiming and finish the running job, or release it while there is time to write."""
        grace_s = serve.get_replica_context()._deployment_config.graceful_shutdown_timeout_s
        patience_s = grace_s - min(RELEASE_MARGIN_S, grace_s / 2)
        if self._loop is not None:
            await asyncio.to_thread(self._loop.drain, patience_s)
        self._heartbeat.close()
        self._queue.close()
