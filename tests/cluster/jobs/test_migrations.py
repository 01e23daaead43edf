"""Migrations: the schema that they make, and concurrent starts."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.queues import Queue

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import insert, text

from cluster.databases.database import open_database
from cluster.jobs.model import JobState
from cluster.jobs.queue import JobQueue
from cluster.jobs.schema import job_outputs, jobs, metadata
from tests.cluster.jobs.tables import claim, new_job

SPAWN = multiprocessing.get_context("spawn")


def test_the_migrated_schema_is_the_metadata(queue: JobQueue, url: str) -> None:
    database = open_database(url)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        context = MigrationContext.configure(connection)
        assert context.get_current_heads() == ("0004",)
    database.close()


def test_the_comparison_sees_a_difference(queue: JobQueue, url: str) -> None:
    database = open_database(url)
    with database.write() as connection:
        connection.execute(text("DROP INDEX jobs_by_adapter"))
        assert compare_metadata(MigrationContext.configure(connection), metadata) != []
    database.close()


def test_what_the_first_revision_stored_is_still_there(url: str) -> None:
    database = open_database(url)
    old = {
        "id": "old",
        "spec": {"n": 1},
        "state": "in_progress",
        "owner": "replica",
        "epoch": 1,
        "attempts": 1,
    }
    old |= {"model": "flux", "adapter": "a", "tenant": "t", "created_at": 1.0, "lease_until": 2.0}
    with database.alone() as connection:
        config = Config()
        config.set_main_option("script_location", "cluster.jobs:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(insert(jobs).values(**old, not_before=0.0, cancel_requested=False))
        connection.execute(insert(job_outputs).values(job_id="old", prompt_index=0, epoch=1, output={"n": 2}))
    database.close()
    queue = JobQueue(url)
    assert [job.id for job in queue.list("t")] == ["old"]
    assert queue.sweep() == 1
    held = claim(queue)
    assert (held.job.id, held.epoch, held.done, held.secret) == ("old", 2, {0}, None)
    queue.finish(held, JobState.SUCCEEDED)
    assert queue.outputs("old") == [{"n": 2}]
    queue.close()


def test_a_second_start_keeps_what_is_there(url: str) -> None:
    first = JobQueue(url)
    (job,) = first.submit([new_job()])
    second = JobQueue(url)
    assert second.get(job.id) == job
    first.close()
    second.close()


def test_a_schema_of_a_newer_program_is_refused(queue: JobQueue, url: str) -> None:
    database = open_database(url)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(CommandError):
        JobQueue(url)


def start(url: str, barrier: threading.Barrier, started: Queue[str]) -> None:
    barrier.wait()
    (job,) = JobQueue(url).submit([new_job()])
    started.put(job.id)


def test_processes_that_start_at_once(url: str) -> None:
    url = url.replace("/jobs.db", "/new/folder/jobs.db")
    barrier, started = SPAWN.Barrier(4), SPAWN.Queue()
    processes = [SPAWN.Process(target=start, args=(url, barrier, started)) for _ in range(4)]
    for process in processes:
        process.start()
    ids = {started.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(ids) == 4
    assert JobQueue(url).depths()["flux"].queued == 4


def test_threads_that_start_at_once(url: str) -> None:
    """The autoscaling policies of one controller start this way."""
    barrier, queues = threading.Barrier(8), []

    def run() -> None:
        barrier.wait()
        queues.append(JobQueue(url))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(queues) == 8
    for queue in queues:
        queue.close()
