"""Helpers for job tables: new jobs, time travel, locks and a checker of job histories."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from sqlalchemy import delete, update

from cluster.databases.database import open_database
from cluster.jobs.model import TRANSITIONS, Claim, Job, JobEvent, JobState, NewJob, Phase, Progress
from cluster.jobs.queue import JobQueue
from cluster.jobs.schema import job_events, jobs, workers

MODEL = "flux"

STEP = Progress(prompt=0, prompts=1, step=3, steps=20, phase=Phase.STEP)


def new_job(adapter: str = "lora", *, model: str = MODEL, **values: Any) -> NewJob:
    return NewJob(id=str(uuid.uuid4()), model=model, spec={"prompts": ["a cat"]}, adapter=adapter, **values)


def submit(queue: JobQueue, *adapters: str) -> list[Job]:
    """Submit one job per adapter, each in its own transaction and with a later time than the last."""
    submitted = []
    for adapter in adapters:
        submitted += queue.submit([new_job(adapter)])
        time.sleep(0.002)  # SQLite's clock counts in milliseconds.
    return submitted


def claim(queue: JobQueue, owner: str = "replica", **values: Any) -> Claim:
    """Claim a job; fail if there is none."""
    claimed = queue.claim(MODEL, owner, **values)
    assert claimed is not None
    return claimed


def state_of(queue: JobQueue, job_id: str) -> JobState:
    job = queue.get(job_id)
    assert job is not None
    return job.state


def let_pass(url: str, seconds: float) -> None:
    """Make all rows `seconds` older, as if that time had passed."""
    times = ("lease_until", "deadline", "not_before", "created_at", "started_at", "finished_at")
    database = open_database(url)
    with database.write() as connection:
        connection.execute(update(jobs).values({name: jobs.c[name] - seconds for name in times}))
        connection.execute(update(workers).values(seen_at=workers.c.seen_at - seconds))
    database.close()


def empty(url: str) -> None:
    """Delete all jobs and replicas."""
    database = open_database(url)
    with database.write() as connection:
        for table in (jobs, job_events, workers):
            connection.execute(delete(table))
    database.close()


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Block all writers."""
    database = open_database(url)
    with database.write() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("LOCK TABLE jobs, workers IN EXCLUSIVE MODE")
        yield
    database.close()


def check_history(events: Sequence[JobEvent]) -> None:
    """Assert the invariants that hold for the history of every job."""
    assert events[0].state is JobState.IN_QUEUE
    assert events[0].epoch == 0
    for before, after in pairwise(events):
        assert after.state in TRANSITIONS[before.state], f"{before.state} -> {after.state}"
        claimed = after.state is JobState.IN_PROGRESS
        assert after.epoch == before.epoch + claimed, "only a claim begins an epoch"
        assert claimed or after.owner == before.owner
        assert after.at >= before.at
