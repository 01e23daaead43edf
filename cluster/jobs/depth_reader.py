"""Reads the load of each model from the job table, in one background thread per process and table."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from cluster.failures import StoreUnavailable
from cluster.jobs.model import Depth
from cluster.jobs.queue import JobQueue

logger = logging.getLogger(__name__)

READ_S = 0.25
"""Pause between two reads."""

STALE_S = 5.0
"""Age at which a read no longer counts, because the table is unreachable."""

DEPLOYED_S = 10.0
"""How long a model counts as deployed after its policy last called `latest`. Serve runs each policy several
times per second. While no model is deployed, the table is not read."""


class LoadReader:
    """Holds the latest depths of all models, so that callers never wait for a read."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._depths: Mapping[str, Depth] = {}
        self._read_at = float("-inf")
        self._asked: dict[str, float] = {}
        self._wanted_at = time.monotonic()
        threading.Thread(target=self._loop, name="load-reader", daemon=True).start()

    def latest(self, model: str) -> Mapping[str, Depth] | None:
        """Return the depths of deployed models by id, without idle ones. None while the table is unreachable.

        The policy of `model` calls this, so `model` counts as deployed. Models that are not deployed are left
        out: nobody can run their jobs, so other models must not yield to them.
        """
        now = time.monotonic()
        self._asked[model] = self._wanted_at = now
        if now - self._read_at >= STALE_S:
            return None
        deployed = {name for name, asked in self._asked.copy().items() if now - asked < DEPLOYED_S}
        return {name: depth for name, depth in self._depths.items() if name in deployed}

    def _loop(self) -> None:
        queue: JobQueue | None = None
        while True:
            try:
                if time.monotonic() - self._wanted_at < DEPLOYED_S:
                    queue = queue or JobQueue(self._url)
                    self._depths, self._read_at = queue.depths(), time.monotonic()
            except StoreUnavailable:
                logger.warning("the job table is unreachable, so replica counts stay as they are")
                time.sleep(STALE_S)
            time.sleep(READ_S)


_readers: dict[str, LoadReader] = {}
_lock = threading.Lock()


def load_reader(url: str) -> LoadReader:
    """Return this process's reader of the job table at `url`. The first call starts it."""
    with _lock:
        if url not in _readers:
            _readers[url] = LoadReader(url)
        return _readers[url]
