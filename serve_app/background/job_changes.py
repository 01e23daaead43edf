"""Followed jobs: what changes of them, read for all event streams of this process together."""

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
"""Least time between two looks, in seconds: the table of a busy service changes all the time."""

PLACES_S = 2.0
"""Least time between two counts of the queue, in seconds: one takes as long as the queue is."""


@dataclass(frozen=True, slots=True)
class View:
    """A job at one moment: its history up to event `last`, and how many jobs are ahead if that is known."""

    job: JobSummary
    last: int
    history: tuple[JobEvent, ...]
    place: int | None


class Follower:
    """Hears of one job on the event loop that made this; only the newest view is kept for a slow one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._view: View | None = None
        self._told: View | None = None

    def tell(self, view: View) -> None:
        """Hand over a view unless it is the one before; called from the looking thread."""
        if view != self._told:
            self._told = view
            self._loop.call_soon_threadsafe(self._take, view)

    async def next(self, timeout_s: float) -> View | None:
        """Return a new view as soon as there is one, None after `timeout_s` seconds."""
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
    """Tells followers how their jobs are doing; a look costs a few queries, whatever their number."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._followers: dict[str, set[Follower]] = {}
        # Of the looking thread alone.
        self._views: Mapping[str, View] = {}
        self._next_look = self._next_count = 0.0

    @contextmanager
    def of(self, job_id: str) -> Iterator[Follower]:
        """Follow a job: the first look inside tells how it is, those after it what has changed."""
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
        """Return how a job is now, None if the id is unknown; for any thread, blocking."""
        return self._read([job_id], {}, count=True).get(job_id)

    def look(self) -> None:
        """Tell all followers, unless that was done just now. For one thread; raises `StoreUnavailable`."""
        now = time.monotonic()
        with self._lock:
            ids = list(self._followers)
        if not ids or now < self._next_look:
            return
        count = now >= self._next_count
        if count:
            self._next_count = now + PLACES_S
        self._views = self._read(ids, self._views, count=count)
        self._next_look = time.monotonic() + SPACING_S
        with self._lock:
            for job_id, view in self._views.items():
                for follower in self._followers.get(job_id, ()):
                    follower.tell(view)

    def _read(self, ids: Collection[str], known: Mapping[str, View], *, count: bool) -> dict[str, View]:
        """Read how jobs are; histories that have not grown, and places not to be counted, are the `known`."""
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
            # What has happened since the job was read is for the next look.
            history = tuple(event for event in events if event.id <= last)
            views[job.id] = View(job=job, last=last, history=history, place=places.get(job.id))
        return views
