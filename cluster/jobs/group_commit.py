"""Submissions of many threads in few transactions: a commit waits for the disk, however much is in it."""

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
        """Its idempotency keys, sorted."""
        return sorted((job.tenant, job.idempotency_key) for job in self.new if job.idempotency_key)


class GroupCommit:
    """Stores submissions on a thread of its own: what comes in during one commit is in the next.

    Callers only wait. One that stops waiting takes nothing along: its jobs are stored all the same, as those
    of a client that does not read the answer, unless it cancels its future before their commit has begun.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[_Submission] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="group-commit")

    def submit(self, new: Sequence[NewJob]) -> Future[list[Job]]:
        """Store all of these jobs or none, as `submission.store`; on disk when the future is done."""
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
            # Two processes that store the same keys must not wait for one another: both sort.
            ordered = sorted(group, key=lambda each: each.order)
            with self._database.write() as connection:
                new = [job for each in ordered for job in each.new]
                jobs = submission.store(connection, self._database.insert, new)
        except Exception as error:
            if len(group) == 1 or isinstance(error, StoreUnavailable):
                for each in group:
                    each.stored.set_exception(error)
            else:
                # One is at fault, and must not fail the others.
                for each in group:
                    self._commit([each])
        else:
            rest = iter(jobs)
            for each in ordered:
                each.stored.set_result([next(rest) for _ in each.new])
