"""Opens the job table in processes started by Serve, and waits as long as the database is unreachable."""

from __future__ import annotations

import logging
import time

from cluster.failures import StoreUnavailable
from cluster.jobs.queue import JobQueue

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause between two attempts."""


def open_queue(url: str, *, lease_s: float = 30.0, run_timeout_s: float = 3600.0) -> JobQueue:
    """Return the queue at `url`. Blocks until its database is reachable.

    Serve permanently gives up on a deployment whose first replicas fail to start, so a missing database must
    not make them fail. The arguments are those of `JobQueue`. Raises `ValueError` for an unsupported URL.
    """
    while True:
        try:
            return JobQueue(url, lease_s=lease_s, run_timeout_s=run_timeout_s)
        except StoreUnavailable as error:
            logger.warning("waiting for the job table: %s", error)
            time.sleep(RETRY_S)
