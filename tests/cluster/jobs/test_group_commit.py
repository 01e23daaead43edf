"""Submissions that share a transaction: each has its own outcome, and one can end without harm to others."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError, StatementError

from cluster.databases import postgres, sqlite
from cluster.databases.database import Insert
from cluster.failures import StoreUnavailable
from cluster.jobs import submission
from cluster.jobs.model import IdempotencyConflict, Job, NewJob
from cluster.jobs.queue import JobQueue
from tests.cluster.jobs.tables import locked, new_job, submit
from tests.support.service import wait_until

THREADS = 16


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of jobs in each transaction, in order."""
    counts: list[int] = []
    really = submission.store

    def store(connection: Connection, insert: Insert, new: Sequence[NewJob]) -> list[Job]:
        counts.append(len(new))
        return really(connection, insert, new)

    monkeypatch.setattr(submission, "store", store)
    return counts


def together(queue: JobQueue, url: str, submissions: Sequence[Sequence[NewJob]]) -> list[Future[list[Job]]]:
    """Submit all at once, while an earlier submission is blocked in its transaction."""
    with ThreadPoolExecutor(len(submissions) + 1) as pool:
        with locked(url):
            first = pool.submit(queue.submit, [new_job("first")])
            time.sleep(0.2)
            rest = [pool.submit(queue.submit, new) for new in submissions]
            time.sleep(0.2)
        first.result()
    return rest


def test_what_comes_in_during_a_commit_is_in_the_next(queue: JobQueue, url: str, stored: list[int]) -> None:
    new = [[new_job(f"{n}"), new_job(f"{n}")] for n in range(THREADS)]
    done = together(queue, url, new)
    assert stored == [1, 2 * THREADS]
    for asked, answer in zip(new, done, strict=True):
        assert [job.id for job in answer.result()] == [job.id for job in asked]
        assert answer.result() == [queue.get(job.id) for job in asked]
        assert all(len(queue.events(job.id)) == 1 for job in asked)


def test_each_submission_has_its_own_outcome(queue: JobQueue, url: str) -> None:
    (known,) = queue.submit([new_job(idempotency_key="k", fingerprint="f")])
    beside, twin = new_job(), new_job(idempotency_key="new", fingerprint="f")
    fine = [new_job() for _ in range(4)]
    bad = NewJob(id="nan", model="flux", spec={"x": float("nan")}, adapter="")
    done = together(
        queue,
        url,
        [
            [fine[0]],
            [beside, new_job(idempotency_key="k", fingerprint="g")],
            [fine[1], new_job(idempotency_key="k", fingerprint="f")],
            [NewJob(id=known.id, model="flux", spec={}, adapter="")],
            [bad],
            [twin],
            [fine[2], new_job(idempotency_key="new", fingerprint="f")],
            [fine[3]],
        ],
    )
    errors = [IdempotencyConflict, IntegrityError, (StatementError, ValueError)]
    for outcome, error in zip((done[1], done[3], done[4]), errors, strict=True):
        with pytest.raises(error):
            outcome.result()
    assert queue.get(beside.id) is None
    assert queue.events(beside.id) == []
    assert [done[n].result()[0].id for n in (0, 2, 6, 7)] == [job.id for job in fine]
    assert done[2].result()[1] == known
    assert done[5].result()[0] == done[6].result()[1]
    assert queue.depths()["flux"].queued == 1 + 1 + 4 + 1


class Gone(Exception):
    """The caller stops waiting."""


def test_a_caller_that_goes_away_takes_nothing_along(queue: JobQueue, url: str) -> None:
    """A thread is interrupted and a request is canceled in the middle of a commit."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        raise Gone

    async def cancel() -> None:
        request = asyncio.create_task(asyncio.to_thread(queue.submit, [canceled]))
        await asyncio.sleep(0.2)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    interrupted, canceled, others = new_job(), new_job(), [new_job() for _ in range(THREADS)]
    before = signal.signal(signal.SIGALRM, leave)
    with ThreadPoolExecutor(THREADS + 1) as pool:
        with locked(url):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(Gone):
                queue.submit([interrupted])
            signal.signal(signal.SIGALRM, before)
            done = [pool.submit(queue.submit, [job]) for job in others]
            leaving = pool.submit(asyncio.run, cancel())
            time.sleep(0.4)
        leaving.result(timeout=10)
        assert [answer.result(timeout=10)[0].id for answer in done] == [job.id for job in others]
    assert queue.get(interrupted.id) is not None
    assert queue.get(canceled.id) is not None
    submit(queue, "next")


def test_an_outage_fails_all_and_is_over_for_the_next(
    queue: JobQueue, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(THREADS) as pool, locked(url):
        monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
        monkeypatch.setattr(postgres, "ANSWER_S", 0.2)
        done = [pool.submit(queue.submit, [new_job()]) for _ in range(THREADS)]
        for answer in done:
            with pytest.raises(StoreUnavailable):
                answer.result(timeout=10)
        monkeypatch.undo()
    assert queue.depths() == {}
    submit(queue, "a")
    assert queue.depths()["flux"].queued == 1


def test_a_future_that_is_canceled_before_its_commit_stores_nothing(queue: JobQueue, url: str) -> None:
    new = [new_job() for _ in range(3)]
    with locked(url):
        running = queue.submit_soon([new[0]])
        wait_until(running.running, 5, "the begin of the first commit")
        canceled, beside = queue.submit_soon([new[1]]), queue.submit_soon([new[2]])
        assert canceled.cancel()
        assert not running.cancel(), "a commit that has begun cannot be canceled"
    assert [future.result(timeout=10)[0].id for future in (running, beside)] == [new[0].id, new[2].id]
    assert queue.get(new[1].id) is None
