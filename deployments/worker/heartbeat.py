"""A worker's heartbeat: renews leases, reads cancellations, and ends the process of a stuck worker.

It has its own thread, so neither the pipeline nor the event loop can delay it. If a job makes no progress for
too long, the heartbeat ends the process: a hung GPU must lose its job instead of keeping it forever.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping

from cluster.failures import StoreUnavailable
from cluster.jobs.model import LeaseLost, Phase
from cluster.jobs.queue import JobQueue
from deployments.worker.run import STALL_LIMITS_S, Run, Stop

logger = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between beats. Each beat writes a job's progress and reads whether it was canceled."""

RENEW_S = 5.0
"""Seconds between renewals of a lease, and between announcements of the replica and its warm LoRA sets."""

EXIT_STALLED = 18
"""Exit status of a worker that ended itself because a job was stuck."""


def end_process(status: int) -> None:
    """End this process at once. Serve would let a broken replica hold its GPU for the whole grace period."""
    logging.shutdown()
    os._exit(status)


class Heartbeat:
    """Beats for the runs of one worker until `close`."""

    def __init__(
        self,
        queue: JobQueue,
        owner: str,
        model: str,
        *,
        warm: Callable[[], Collection[str]],
        lease_s: float,
        stall_limits_s: Mapping[Phase, float] = STALL_LIMITS_S,
    ) -> None:
        self._queue = queue
        self._owner = owner
        self._model = model
        self._warm = warm
        self._lease_s = lease_s
        self._limits = stall_limits_s
        self._runs: dict[str, Run] = {}
        self._announced = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Announce the replica and start to beat."""
        self._announce()
        self._thread.start()

    def watch(self, run: Run) -> None:
        """Start to renew the lease of a run. A run that is not renewed for 2/3 of a lease stops by itself."""
        run.unrenewed_s = self._lease_s * 2 / 3
        self._runs[run.prefix] = run

    def forget(self, run: Run) -> None:
        """Stop renewing the lease of a settled run."""
        self._runs.pop(run.prefix, None)

    @property
    def alive(self) -> bool:
        """True if the thread runs; without it, healthy jobs lose their leases."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop beating and withdraw the replica's presence."""
        self._closing.set()
        self._thread.join(timeout=2 * BEAT_S)
        try:
            self._queue.withdraw(self._owner)
        except StoreUnavailable:
            logger.warning("the job table is unreachable; the presence of %s will expire", self._owner)

    def _loop(self) -> None:
        while not self._closing.wait(min(BEAT_S, self._lease_s / 6)):
            for run in list(self._runs.values()):
                self._beat(run)
            if time.monotonic() - self._announced >= min(RENEW_S, self._lease_s / 3):
                self._announce()

    def _beat(self, run: Run) -> None:
        if run.stalled(self._limits):
            logger.error(
                "job %s is stuck in phase %s; ending the process", run.claim.job.id, run.progress.phase
            )
            end_process(EXIT_STALLED)
        now = time.monotonic()
        due = now - run.renewed >= min(RENEW_S, self._lease_s / 3)
        try:
            lease = self._queue.heartbeat(run.claim, run.progress, renew=due)
        except LeaseLost:
            run.stop(Stop.LEASE_LOST)
        except StoreUnavailable:
            # When the lease ends, another worker may take the job, so this one must have left the pipeline.
            # The failed call may have taken a while, so `now` is out of date.
            unrenewed = time.monotonic() - run.renewed
            if unrenewed > run.unrenewed_s:
                run.stop(Stop.LEASE_LOST)
            if unrenewed > self._lease_s:
                logger.error(
                    "job %s did not stop before its lease ended; ending the process", run.claim.job.id
                )
                end_process(EXIT_STALLED)
        else:
            if due:
                run.renewed = now
            if lease.timed_out:
                run.stop(Stop.TIMED_OUT)
            if lease.cancel_requested:
                run.stop(Stop.CANCELED)

    def _announce(self) -> None:
        try:
            self._queue.announce(self._owner, self._model, self._warm())
            self._announced = time.monotonic()
        except StoreUnavailable:
            logger.warning("the job table is unreachable; %s could not announce itself", self._owner)
