"""Opens the job table for processes that Serve starts, however long its database is away."""

from __future__ import annotations

import logging
import time

from cluster.failures import StoreUnavailable
from cluster.jobs.queue import JobQueue

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause between two tries."""


def open_queue(url: str, *, lease_s: float = 30.0, run_timeout_s: float = 3600.0) -> JobQueue:
    """Return the queue at `url` as soon as its database can be reached; blocks until then.

    Serve gives up for good a deployment whose first replicas fail to start, so an absent database must not
    be a failure. The arguments are those of `JobQueue`. Raises `ValueError` for a URL that is not supported.
    """
    while True:
        try:
            return JobQueue(url, lease_s=lease_s, run_timeout_s=run_timeout_s)
        except StoreUnavailable as error:
            logger.warning("waiting for the job table: %s", error)
            time.sleep(RETRY_S)
