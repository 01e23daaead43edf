"""What a job is: its states and legal transitions, and the records that travel between queue and callers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """The states on the wire, as the reference server names them."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def terminal(self) -> bool:
        """Whether a job in this state never changes again."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.IN_QUEUE: frozenset({JobState.IN_PROGRESS, JobState.CANCELED, JobState.FAILED}),
    JobState.IN_PROGRESS: frozenset(
        {JobState.IN_QUEUE, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED}
    ),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELED: frozenset(),
}


class Phase(StrEnum):
    """What a worker is doing for a job; each phase has its own stall limit."""

    FETCH = "fetch"
    LOAD = "load"
    ENCODE = "encode"
    STEP = "step"
    DECODE = "decode"
    PUBLISH = "publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWebhook:
    """Where to tell that a job has ended in one of the states `events`; `secret` is the query, encrypted."""

    url: str
    events: tuple[JobState, ...]
    secret: str | None = field(default=None, repr=False)


OPEN_TENANT = ""
"""The owner of every job while the service is open, without API keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What admission hands to the queue.

    `spec` is JSON and opaque to this layer; `adapter` names the LoRA set of the job, so that claims can
    prefer replicas that already hold it. `tenant` is the owner of the job and of its idempotency key
    (empty while the service is open), `fingerprint` the hash of the request body behind that key. `secret` is
    ciphertext for the job's worker alone, erased when the job has come to its end. `batch` names what it was
    submitted together with, among the tenant's jobs.
    """

    id: str
    model: str
    spec: Mapping[str, Any]
    adapter: str
    tenant: str = OPEN_TENANT
    idempotency_key: str | None = None
    fingerprint: str | None = None
    secret: str | None = field(default=None, repr=False)
    webhook: NewWebhook | None = None
    batch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a running job is: prompt and step count from 0, `steps` is of the current prompt."""

    prompt: int
    prompts: int
    step: int
    steps: int
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """How a job is doing. Times are seconds since the epoch on the database's clock."""

    id: str
    seq: int
    model: str
    tenant: str
    state: JobState
    attempts: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    cancel_requested: bool
    progress: Progress | None
    error: str | None
    error_code: str | None
    batch: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JobSummary):
    """One row of the job table, with what it renders and what came of it."""

    spec: Mapping[str, Any]
    adapter: str
    fingerprint: str | None
    epoch: int
    owner: str | None
    result: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lease on a job: writes under it carry owner and epoch, and are refused once either changed.

    `done` are the indexes of prompts whose outputs an earlier attempt recorded: they are not rendered again.
    `secret` is that of the `NewJob`.
    """

    job: Job
    owner: str
    epoch: int
    done: frozenset[int] = frozenset()
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What a worker learns at each heartbeat of a claim that it still holds."""

    cancel_requested: bool
    timed_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One line of the append-only history of a job; `id` grows with every change of the job."""

    id: int
    job_id: str
    state: JobState
    epoch: int
    owner: str | None
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """The load of one model: jobs, replicas seen alive, and the age in seconds of the oldest queued job."""

    queued: int
    running: int
    workers: int
    oldest_s: float


class LeaseLost(Exception):
    """The claim is no longer this worker's: its writes are refused."""


class IdempotencyConflict(Exception):
    """The idempotency key was used before with another request body."""
