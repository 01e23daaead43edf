"""One thread that watches the job table for all long polls and event streams of this process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.failures import StoreUnavailable
from cluster.jobs.queue import JobQueue
from serve_app.background.job_changes import Following

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Longest time between two reads while a request waits, in seconds, in case a change notice is missed."""


class _Ended:
    """The end of one job, awaited on the event loop that created this object."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake the request. Called from the watching thread."""
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float) -> None:
        """Return when the job has ended, or after `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return


class Waiting:
    """Wakes requests when their jobs end, with one query per change of the table for any number of requests.

    The same thread runs `following`, which serves the event streams.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self.following = Following(queue)
        self._lock = threading.Lock()
        self._awaited: dict[str, set[_Ended]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waiting", daemon=True)
        self._thread.start()

    @contextmanager
    def end_of(self, job_id: str) -> Iterator[_Ended]:
        """Watch a job. Read its state inside: the read sees an earlier end, a later one wakes the request."""
        ended = _Ended()
        with self._lock:
            self._awaited.setdefault(job_id, set()).add(ended)
        try:
            yield ended
        finally:
            with self._lock:
                self._awaited[job_id].discard(ended)
                if not self._awaited[job_id]:
                    del self._awaited[job_id]

    def close(self) -> None:
        """Stop the thread. Blocks for up to `LOOK_S`."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._watch()
            except StoreUnavailable as error:
                logger.warning("long polls and event streams cannot read the job table: %s", error)
                self._closed.wait(LOOK_S)

    def _watch(self) -> None:
        watch = self._queue.watch()
        try:
            while not self._closed.is_set():
                watch.wait(LOOK_S)
                with self._lock:
                    ids = list(self._awaited)
                finished = self._queue.finished(ids) if ids else set()
                with self._lock:
                    for ended in (each for job_id in finished for each in self._awaited.get(job_id, ())):
                        ended.notify()
                self.following.refresh()
        finally:
            watch.close()
