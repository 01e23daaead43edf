"""The job table in SQLite: the file's path, and what happens when it is locked, full or deleted."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cluster.databases import sqlite
from cluster.databases.database import open_database
from cluster.failures import StoreUnavailable
from cluster.jobs.queue import JobQueue
from tests.cluster.jobs.tables import new_job, submit


@pytest.fixture
def url(sqlite_url: str) -> str:
    return sqlite_url


def test_a_relative_path_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    queue = JobQueue("sqlite:///var/jobs.db")
    monkeypatch.chdir("/")
    submit(queue, "a")
    assert (tmp_path / "var" / "jobs.db").is_file()
    queue.close()


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
    monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
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
