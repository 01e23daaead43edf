"""Checks the guarantees for every accepted job (`docs/architecture.md`, "The job's life") after it has ended.

It reads the append-only `job_events`, the recorded outputs and the stored objects.
"""

from __future__ import annotations

import hashlib
import json

from cluster.jobs.model import Job, JobEvent, JobState
from cluster.jobs.queue import JobQueue
from cluster.objects.store import ObjectStore
from tests.cluster.jobs.tables import check_history

MAX_ATTEMPTS = 3


def check_contract(queue: JobQueue, store: ObjectStore, job_id: str) -> Job:
    """Assert that a job was not lost, ended once, and published its result once."""
    job = queue.get(job_id)
    assert job is not None, f"the accepted job {job_id} is lost"
    events = queue.events(job_id)
    check_history(events)
    _check_end(job, events)
    if job.state is JobState.SUCCEEDED:
        _check_result(queue, store, job)
    else:
        assert job.result is None
        assert (job.error_code is not None) is (job.state is JobState.FAILED)
    return job


def _check_end(job: Job, events: list[JobEvent]) -> None:
    """Assert that only the last event is terminal, it matches the row, and each run has its own epoch."""
    assert [event.state.terminal for event in events] == [False] * (len(events) - 1) + [True], events
    assert (job.state, job.epoch, job.owner) == (events[-1].state, events[-1].epoch, events[-1].owner)
    runs = [event.epoch for event in events if event.state is JobState.IN_PROGRESS]
    assert runs == list(range(1, job.epoch + 1)), events
    assert job.attempts <= min(job.epoch, MAX_ATTEMPTS)


def _check_result(queue: JobQueue, store: ObjectStore, job: Job) -> None:
    """Assert that the job ran; each prompt has one output, from one of its runs, with intact objects."""
    assert job.epoch > 0 and job.result is not None and job.error_code is None
    outputs = queue.outputs(job.id)
    assert [output["seed"] for output in outputs] == [prompt["seed"] for prompt in job.spec["prompts"]]
    for output in outputs:
        owner, epoch, _ = output["key"].split("/")
        assert owner == job.id and 1 <= int(epoch) <= job.epoch
        data = store.get(output["key"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (output["bytes"], output["sha256"])
        manifest = json.loads(store.get(output["manifest_key"]))
        assert (manifest["request_id"], manifest["sha256"]) == (job.id, output["sha256"])
