"""Keeps the job table moving while workers may all be at zero, and removes what is kept long enough."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from cluster.jobs.queue import JobQueue
from cluster.objects.store import ObjectStore

logger = logging.getLogger(__name__)

SWEEP_S = 1.0
"""Pause between two looks for leases that ended and jobs that ran too long, in seconds."""

EXPIRE_S = 60.0
"""Pause between two looks for jobs that are old enough to be removed, in seconds."""

DAY_S = 86_400.0

BATCH = 20
"""Jobs that are removed at a time."""


def remove_old(queue: JobQueue, store: ObjectStore, age_s: float) -> Iterator[int]:
    """Remove jobs that ended `age_s` seconds ago with their objects; yields the number of each batch.

    Objects go first: after a crash their row still leads to them.
    """
    while ids := queue.expired(age_s, BATCH):
        for job_id in ids:
            store.delete(job_id)
        yield queue.forget(ids)


class Janitor:
    """Sweeps the job table and removes old jobs, each on a thread of its own: removal waits for the store.

    Every gateway does; the table lets one at a time sweep, and removing twice does no harm.
    """

    def __init__(self, queue: JobQueue, store: ObjectStore, retention_s: float) -> None:
        """Start; jobs are removed `retention_s` seconds after their end, or never if that is 0."""
        self._queue = queue
        self._store = store
        self._retention_s = retention_s
        self._closed = threading.Event()
        duties: list[tuple[float, Callable[[], object]]] = [(SWEEP_S, queue.sweep)]
        if retention_s:
            duties.append((EXPIRE_S, self._expire))
        self._threads = [
            threading.Thread(target=self._run, args=duty, name="janitor", daemon=True) for duty in duties
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads after what they are doing."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _run(self, pause_s: float, duty: Callable[[], object]) -> None:
        while not self._closed.wait(pause_s):
            try:
                duty()
            except Exception:
                # Whatever it was, without this thread no job of a lost worker would ever run again.
                logger.exception("the janitor failed; it tries again")

    def _expire(self) -> None:
        for _ in remove_old(self._queue, self._store, self._retention_s):
            if self._closed.is_set():
                return
