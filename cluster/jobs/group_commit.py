"""Stores the submissions of many threads in few transactions, because each commit waits for the disk."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from cluster.databases.database import Database
from cluster.failures import StoreUnavailable
from cluster.jobs import submission
from cluster.jobs.model import Job, NewJob


@dataclass(frozen=True, slots=True)
class _Submission:
    new: Sequence[NewJob]
    stored: Future[list[Job]] = field(default_factory=Future)

    @property
    def order(self) -> list[tuple[str, str]]:
        """The submission's tenants and idempotency keys, sorted."""
        return sorted((job.tenant, job.idempotency_key) for job in self.new if job.idempotency_key)


class GroupCommit:
    """Stores submissions on its own thread. Submissions that arrive during a commit join the next one.

    If a caller stops waiting, its jobs are still stored. Only if it cancels the future before the commit
    starts are they dropped.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[_Submission] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="group-commit")

    def submit(self, new: Sequence[NewJob]) -> Future[list[Job]]:
        """Store all of these jobs or none, as `submission.store` does. A finished future means on disk."""
        mine = _Submission(new)
        with self._lock:
            first = not self._waiting
            self._waiting.append(mine)
        if first:
            self._thread.submit(self._commit_waiting)
        return mine.stored

    def _commit_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        group = [each for each in waiting if each.stored.set_running_or_notify_cancel()]
        if group:
            self._commit(group)

    def _commit(self, group: Sequence[_Submission]) -> None:
        try:
            # Sorted, so that two processes that store the same keys cannot deadlock.
            ordered = sorted(group, key=lambda each: each.order)
            with self._database.write() as connection:
                new = [job for each in ordered for job in each.new]
                jobs = submission.store(connection, self._database.insert, new)
        except Exception as error:
            if len(group) == 1 or isinstance(error, StoreUnavailable):
                for each in group:
                    each.stored.set_exception(error)
            else:
                # One submission is at fault: commit each alone, so that the others succeed.
                for each in group:
                    self._commit([each])
        else:
            rest = iter(jobs)
            for each in ordered:
                each.stored.set_result([next(rest) for _ in each.new])
