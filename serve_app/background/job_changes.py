"""Reads the changes of followed jobs, once for all event streams of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.jobs.model import JobEvent, JobState, JobSummary
from cluster.jobs.queue import JobQueue

SPACING_S = 0.2
"""Shortest time between two reads, in seconds: the table of a busy service changes all the time."""

PLACES_S = 2.0
"""Shortest time between two counts of the queue, in seconds: a longer queue takes longer to count."""


@dataclass(frozen=True, slots=True)
class View:
    """A job at one moment: its history up to event `last`; `place` is the number of jobs ahead if known."""

    job: JobSummary
    last: int
    history: tuple[JobEvent, ...]
    place: int | None


class Follower:
    """Receives views of one job on the event loop that created it. A slow one gets only the newest."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._view: View | None = None
        self._sent: View | None = None

    def notify(self, view: View) -> None:
        """Pass on a view unless it equals the previous one. Called from the reading thread."""
        if view != self._sent:
            self._sent = view
            self._loop.call_soon_threadsafe(self._take, view)

    async def next(self, timeout_s: float) -> View | None:
        """Return the next view, or None after `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return None
        self._event.clear()
        return self._view

    def _take(self, view: View) -> None:
        self._view = view
        self._event.set()


class Following:
    """Sends followers the views of their jobs. A read takes a few queries, for any number of followers."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._followers: dict[str, set[Follower]] = {}
        # Used only by the reading thread.
        self._views: Mapping[str, View] = {}
        self._next_read = self._next_count = 0.0

    @contextmanager
    def of(self, job_id: str) -> Iterator[Follower]:
        """Follow a job. The first read inside sends its current view, later reads only changed views."""
        follower = Follower()
        with self._lock:
            self._followers.setdefault(job_id, set()).add(follower)
        try:
            yield follower
        finally:
            with self._lock:
                self._followers[job_id].discard(follower)
                if not self._followers[job_id]:
                    del self._followers[job_id]

    def view(self, job_id: str) -> View | None:
        """Return the current view of a job, None if the id is unknown. Blocking; callable from any thread."""
        return self._read([job_id], {}, count=True).get(job_id)

    def refresh(self) -> None:
        """Read all followed jobs and notify their followers, at most every `SPACING_S` seconds.

        Call it from one thread only. Raises `StoreUnavailable`.
        """
        now = time.monotonic()
        with self._lock:
            ids = list(self._followers)
        if not ids or now < self._next_read:
            return
        count = now >= self._next_count
        if count:
            self._next_count = now + PLACES_S
        self._views = self._read(ids, self._views, count=count)
        self._next_read = time.monotonic() + SPACING_S
        with self._lock:
            for job_id, view in self._views.items():
                for follower in self._followers.get(job_id, ()):
                    follower.notify(view)

    def _read(self, ids: Collection[str], known: Mapping[str, View], *, count: bool) -> dict[str, View]:
        """Read the views of jobs. Unchanged histories, and places unless `count`, are taken from `known`."""
        latest = self._queue.latest(ids)
        grown = [job.id for job, last in latest if job.id not in known or known[job.id].last != last]
        histories = self._queue.histories(grown) if grown else {}
        queued = [job for job, _ in latest if job.state is JobState.IN_QUEUE]
        if count:
            places = self._queue.places(queued) if queued else {}
        else:
            places = {job.id: known[job.id].place for job in queued if job.id in known}
        views = {}
        for job, last in latest:
            events = histories[job.id] if job.id in histories else known[job.id].history
            # Events since the job was read belong to the next view.
            history = tuple(event for event in events if event.id <= last)
            views[job.id] = View(job=job, last=last, history=history, place=places.get(job.id))
        return views
