"""What a job is: its states, their legal transitions, and the records that queue and callers exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """The states of a job, with the names of the reference server, as in the API."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def terminal(self) -> bool:
        """True if a job in this state never changes again."""
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
    """What a worker is doing for a job. Each phase has its own stall limit."""

    FETCH = "fetch"
    LOAD = "load"
    ENCODE = "encode"
    STEP = "step"
    DECODE = "decode"
    PUBLISH = "publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWebhook:
    """The URL to notify when a job ends in one of the states `events`. `secret` is its query, encrypted."""

    url: str
    events: tuple[JobState, ...]
    secret: str | None = field(default=None, repr=False)


OPEN_TENANT = ""
"""The tenant of every job if the service is open, that is, without API keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What admission hands to the queue.

    - `spec` is JSON and opaque to this layer.
    - `adapter` identifies the job's LoRA set, so that claims can prefer replicas that already hold it.
    - `tenant` owns the job and its idempotency key. It is empty if the service is open.
    - `fingerprint` is the hash of the request body that the idempotency key stands for.
    - `secret` is ciphertext for the job's worker. It is erased when the job ends.
    - `batch` is the name of the job's batch, unique per tenant.
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
    """The progress of a running job. `prompt` and `step` count from 0; `steps` is for the current prompt."""

    prompt: int
    prompts: int
    step: int
    steps: int
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """A job without its spec and result. Times are seconds since the epoch on the database's clock."""

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
    """A job as stored in the table, with its spec and result."""

    spec: Mapping[str, Any]
    adapter: str
    fingerprint: str | None
    epoch: int
    owner: str | None
    result: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lease on a job. Writes under it name owner and epoch, and are refused once either has changed.

    `done` holds the indexes of prompts that need no rendering, because an earlier attempt recorded their
    outputs. `secret` is that of the `NewJob`.
    """

    job: Job
    owner: str
    epoch: int
    done: frozenset[int] = frozenset()
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The reply to a heartbeat of a claim that is still valid."""

    cancel_requested: bool
    timed_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One entry in the append-only history of a job. `id` grows with each state change."""

    id: int
    job_id: str
    state: JobState
    epoch: int
    owner: str | None
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """The load of one model: jobs, live replicas, and the age of the oldest queued job in seconds."""

    queued: int
    running: int
    workers: int
    oldest_s: float


class LeaseLost(Exception):
    """The worker no longer holds the claim, so the write was refused."""


class IdempotencyConflict(Exception):
    """The idempotency key was already used with a different request body."""
