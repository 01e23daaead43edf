"""Sweeps the job table and removes old jobs: in the gateway, because all workers may be scaled to zero."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from cluster.jobs.queue import JobQueue
from cluster.objects.store import ObjectStore

logger = logging.getLogger(__name__)

SWEEP_S = 1.0
"""Pause between two checks for expired leases and overdue jobs, in seconds."""

EXPIRE_S = 60.0
"""Pause between two checks for jobs to remove, in seconds."""

DAY_S = 86_400.0

BATCH = 20
"""Number of jobs removed at a time."""


def remove_old(queue: JobQueue, store: ObjectStore, age_s: float) -> Iterator[int]:
    """Remove jobs that ended at least `age_s` seconds ago, with their objects. Yields the number per batch.

    Objects are deleted before rows, so that after a crash the row still leads to what is left.
    """
    while ids := queue.expired(age_s, BATCH):
        for job_id in ids:
            store.delete(job_id)
        yield queue.forget(ids)


class Janitor:
    """Sweeps the job table and removes old jobs, on separate threads: removal waits for the object store.

    Every gateway has one. The job table lets one gateway sweep at a time; removing a job twice does no harm.
    """

    def __init__(self, queue: JobQueue, store: ObjectStore, retention_s: float) -> None:
        """Start the threads. Jobs are removed `retention_s` seconds after their end, never if that is 0."""
        self._queue = queue
        self._store = store
        self._retention_s = retention_s
        self._closed = threading.Event()
        tasks: list[tuple[float, Callable[[], object]]] = [(SWEEP_S, queue.sweep)]
        if retention_s:
            tasks.append((EXPIRE_S, self._expire))
        self._threads = [
            threading.Thread(target=self._run, args=task, name="janitor", daemon=True) for task in tasks
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads once they have finished their current work."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _run(self, pause_s: float, task: Callable[[], object]) -> None:
        while not self._closed.wait(pause_s):
            try:
                task()
            except Exception:
                # This thread must survive any error: without it, jobs of lost workers would never run again.
                logger.exception("the janitor failed and will try again")

    def _expire(self) -> None:
        for _ in remove_old(self._queue, self._store, self._retention_s):
            if self._closed.is_set():
                return
