"""Keeps the job table moving while workers may all be at zero: leases that ended, jobs that ran too long."""

from __future__ import annotations

import logging
import threading

from cluster.queue import JobQueue

logger = logging.getLogger(__name__)

SWEEP_S = 1.0
"""Pause between two rounds, in seconds."""


class Janitor:
    """Sweeps the job table on a thread of its own; every gateway does, and the table lets one at a time."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the round that it is in."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(SWEEP_S):
            try:
                self._queue.sweep()
            except Exception:
                # Whatever it was, without this thread no job of a lost worker would ever run again.
                logger.exception("the janitor failed; it tries again")
