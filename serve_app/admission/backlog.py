"""Limits on queued jobs, enforced without counting the job table at every submission."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from cluster.jobs.model import OPEN_TENANT
from cluster.jobs.queue import JobQueue
from serve_app.settings import GatewayArgs
from serve_app.wire.refusals import Code, Refusal

COUNT_S = 1.0
"""How long a count is used, in seconds. Jobs that other gateways store meanwhile can exceed a limit."""


@dataclass
class _Count:
    """Queued jobs in total and of one tenant: the table's count, plus jobs that this process added since."""

    until: float
    queued: int
    own: int


class Backlog:
    """Limits queued jobs with cached counts: counting takes longer the longer the queue is.

    A cached count is too high once jobs have left the queue, so only a new count can refuse a submission.
    """

    def __init__(self, queue: JobQueue, settings: GatewayArgs) -> None:
        self._queue = queue
        self._settings = settings
        self._counts: dict[str, _Count] = {}
        self._lock = threading.Lock()

    def enter(self, tenant: str, jobs: int = 1) -> Refusal | None:
        """Count `jobs` more for `tenant`, all or none, or return the refusal. Blocking."""
        with self._lock:
            count = self._counts.get(tenant)
            if count and time.monotonic() < count.until and not self._refusal(tenant, count, jobs):
                self._add(tenant, jobs)
                return None
        until = time.monotonic() + COUNT_S
        count = _Count(until, *self._queue.waiting(tenant))
        refusal = self._refusal(tenant, count, jobs)
        with self._lock:
            self._counts[tenant] = count
            if not refusal:
                self._add(tenant, jobs)
        return refusal

    def _add(self, tenant: str, jobs: int) -> None:
        self._counts[tenant].own += jobs
        for count in self._counts.values():
            count.queued += jobs

    def _refusal(self, tenant: str, count: _Count, jobs: int) -> Refusal | None:
        """Return the refusal if `jobs` more are too many. An open service has no limit per key."""
        bounds = [("max_queued", self._settings.max_queued, count.queued)]
        if tenant != OPEN_TENANT:
            bounds.append(("max_queued_per_key", self._settings.max_queued_per_key, count.own))
        for bound, most, _ in bounds:
            if jobs > most:
                return Refusal(Code.BATCH_TOO_LARGE, bound=bound, most=most)
        for bound, most, waiting in bounds:
            if waiting + jobs > most:
                return Refusal(Code.TOO_MANY_QUEUED, bound=bound, most=most)
        return None
