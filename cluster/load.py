"""How busy each model is, read from the job table by one background thread per process and table."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from cluster.connect import open_queue
from cluster.jobs import Depth, StoreUnavailable
from cluster.queue import JobQueue

logger = logging.getLogger(__name__)

READ_S = 0.25
"""Pause between two readings."""

STALE_S = 5.0
"""Age at which a reading no longer counts: the table is away."""


class LoadReader:
    """The latest depths of all models, never waited for."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._depths: Mapping[str, Depth] = {}
        self._read_at = float("-inf")
        threading.Thread(target=self._loop, name="load-reader", daemon=True).start()

    def latest(self) -> Mapping[str, Depth] | None:
        """Depth by model id (idle models are absent); None while the table cannot be read."""
        return self._depths if time.monotonic() - self._read_at < STALE_S else None

    def _loop(self) -> None:
        queue: JobQueue | None = None
        while True:
            try:
                queue = queue or open_queue(self._url)
                self._depths, self._read_at = queue.depths(), time.monotonic()
            except StoreUnavailable:
                logger.warning("the job table is away; replica counts stay as they are")
                time.sleep(STALE_S)
            time.sleep(READ_S)


_readers: dict[str, LoadReader] = {}
_lock = threading.Lock()


def load_reader(url: str) -> LoadReader:
    """Return this process's reader of the job table at `url`; the first call starts it."""
    with _lock:
        if url not in _readers:
            _readers[url] = LoadReader(url)
        return _readers[url]
