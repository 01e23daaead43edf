"""Where the table may be, what happens while it is away, and who is woken by a change."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import threading
import time
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from cluster import database
from cluster.database import jobs_url, open_database
from cluster.jobs import StoreUnavailable
from cluster.queue import JobQueue
from tests.cluster.tables import new_job, submit

SPAWN = multiprocessing.get_context("spawn")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:s3cret@host/db",
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


def test_a_relative_path_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    queue = JobQueue("sqlite:///var/jobs.db")
    monkeypatch.chdir("/")
    submit(queue, "a")
    assert (tmp_path / "var" / "jobs.db").is_file()
    queue.close()


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBS_URL", raising=False)
    assert jobs_url("sqlite:///a") == "sqlite:///a"
    monkeypatch.setenv("JOBS_URL", "")
    assert jobs_url("sqlite:///a") == "sqlite:///a"
    monkeypatch.setenv("JOBS_URL", "sqlite:///b")
    assert jobs_url("sqlite:///a") == "sqlite:///b"


def test_a_commit_is_on_disk_when_it_returns(queue: JobQueue, url: str) -> None:
    submit(queue, "a")
    opened = open_database(url)
    for transaction in (opened.read, opened.write):
        with transaction() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    opened.close()


def test_a_locked_table_is_away_for_writers_only(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.2)
    (job,) = submit(queue, "a")
    other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        submit(queue, "b")
    assert queue.get(job.id) == job
    other.execute("ROLLBACK")
    other.close()
    submit(queue, "b")
    assert queue.depths()["flux"].queued == 2


def test_a_table_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable):
        JobQueue(f"sqlite:///{tmp_path}/file/jobs.db")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreUnavailable):
        JobQueue(f"sqlite:///{tmp_path}/folder")


def test_a_table_that_is_gone(queue: JobQueue, tmp_path: Path) -> None:
    submit(queue, "a")
    queue.close()
    for file in tmp_path.glob("jobs.db*"):
        file.unlink()
    with pytest.raises(StoreUnavailable):
        queue.depths()
    with pytest.raises(StoreUnavailable):
        submit(queue, "b")


def test_a_full_disk_loses_nothing(queue: JobQueue) -> None:
    (job,) = submit(queue, "a")
    with queue._database.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreUnavailable, match="full"):
        queue.submit([new_job() for _ in range(200)])
    assert queue.depths()["flux"].queued == 1
    assert queue.get(job.id) == job


def test_many_threads_share_one_queue(queue: JobQueue) -> None:
    """More threads than connections, all of them reading and writing."""
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
    assert sorted(delays)[2] < 0.05, "the rest is left to a busy machine"
    assert not watch.wait(0.05)
    watch.close()


def test_a_watch_misses_nothing_between_two_waits(queue: JobQueue) -> None:
    watch = queue.watch()
    submit(queue, "a")
    assert watch.wait(0)
    assert not watch.wait(0)
    watch.close()


def test_a_watch_says_nothing_while_the_table_is_away(queue: JobQueue, tmp_path: Path) -> None:
    queue.close()
    other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN IMMEDIATE")
    watch = queue.watch()
    assert not watch.wait(0.1)
    other.execute("ROLLBACK")
    other.close()
    submit(queue, "a")
    assert watch.wait(1)
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
