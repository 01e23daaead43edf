"""Database URLs, outages, and which watches a change wakes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.queues import Queue

import pytest

from cluster.databases.database import jobs_url, open_database
from cluster.jobs.queue import JobQueue
from tests.cluster.jobs.tables import new_job, submit

SPAWN = multiprocessing.get_context("spawn")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:p@s3cret@host/db",
        "mysql+pymysql://user:s3cret@host/db",
        "postgresql://user@host:s3cret/db",
        "sqlite://",
        "sqlite:///:memory:",
        "s3cret",
        "",
    ],
)
def test_other_urls_are_refused_without_their_secrets(url: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///path/to/jobs\.db") as refusal:
        open_database(url)
    assert "s3cret" not in str(refusal.value)


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBS_URL", raising=False)
    assert jobs_url("sqlite:///a") == "sqlite:///a"
    monkeypatch.setenv("JOBS_URL", "")
    assert jobs_url("sqlite:///a") == "sqlite:///a"
    monkeypatch.setenv("JOBS_URL", "sqlite:///b")
    assert jobs_url("sqlite:///a") == "sqlite:///b"


def test_many_threads_share_one_queue(queue: JobQueue) -> None:
    """There are more threads than connections, and all of them read and write."""
    failures: list[Exception] = []

    def use(n: int) -> None:
        try:
            for _ in range(5):
                (job,) = queue.submit([new_job(f"lora-{n}")])
                assert queue.get(job.id) == job
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert queue.depths()["flux"].queued == 120


def commit_when_asked(url: str, asked: Queue[bool], done: Queue[float]) -> None:
    queue = JobQueue(url)
    done.put(0.0)
    while asked.get():
        queue.submit([new_job()])
        done.put(time.monotonic())


def test_a_watch_wakes_at_the_commit_of_another_process(queue: JobQueue, url: str) -> None:
    asked, done = SPAWN.Queue(), SPAWN.Queue()
    other = SPAWN.Process(target=commit_when_asked, args=(url, asked, done))
    other.start()
    assert done.get(timeout=30) == 0.0
    watch, delays = queue.watch(), []
    assert not watch.wait(0.1)
    for _ in range(9):
        asked.put(True)
        assert watch.wait(10)
        woken = time.monotonic()
        delays.append(woken - done.get(timeout=10))
    asked.put(False)
    other.join()
    assert sorted(delays)[2] < 0.05, "only the fastest third counts: the machine may be busy"
    assert not watch.wait(0.05)
    watch.close()


def test_a_watch_misses_nothing_between_two_waits(queue: JobQueue) -> None:
    watch = queue.watch()
    submit(queue, "a")
    assert watch.wait(10)
    assert not watch.wait(0)
    watch.close()


def test_a_closed_watch_lets_its_thread_go(queue: JobQueue) -> None:
    watch, results = queue.watch(), []
    thread = threading.Thread(target=lambda: results.append(watch.wait(60)))
    thread.start()
    time.sleep(0.05)
    watch.close()
    watch.close()
    thread.join(timeout=5)
    assert results == [False]
    assert not watch.wait(60)


def test_queues_leave_no_open_files(url: str) -> None:
    JobQueue(url).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        queue = JobQueue(url)
        submit(queue, "a")
        watch = queue.watch()
        watch.close()
        queue.close()
    assert len(os.listdir("/proc/self/fd")) == before
