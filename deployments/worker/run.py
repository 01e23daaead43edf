"""One claimed job on this worker: its progress, and whether it has to stop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from enum import StrEnum

from pydantic import ValidationError

from cluster.failures import FailureCode, JobFailure
from cluster.jobs.model import Claim, Phase, Progress
from deployments.spec.job import RenderSpec

STALL_LIMITS_S: Mapping[Phase, float] = {
    Phase.FETCH: 600.0,
    Phase.LOAD: 1800.0,
    Phase.ENCODE: 600.0,
    Phase.STEP: 900.0,
    Phase.DECODE: 900.0,
    Phase.PUBLISH: 600.0,
}
"""Seconds that a phase may go without progress before the worker counts as stalled."""


class Stop(StrEnum):
    """The reason why a running job has to stop early."""

    CANCELED = "canceled"
    LEASE_LOST = "lease_lost"
    RELEASED = "released"
    TIMED_OUT = "timed_out"


class Stopped(Exception):
    """Raised out of the pipeline at the first step after `Run.stop`."""


class Run:
    """A claim that is being rendered and published, shared by the render, publish and heartbeat threads.

    The first reason to stop wins, except that a lost lease overrides all others: then nothing may be written.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.failure: JobFailure | None = None
        try:
            self.spec = RenderSpec.model_validate(claim.job.spec)
        except ValidationError:
            # A row of another version. The run has failed before it begins; `check` ends it at once.
            self.spec = RenderSpec(model=claim.job.model, loras=(), prompts=())
            message = "this version of the service cannot read the job's spec; submit the request again"
            self.failure = JobFailure(FailureCode.SPEC_UNREADABLE, message)
        self.started = time.monotonic()
        self.renewed = self.started
        self.unrenewed_s = math.inf
        """Seconds after `renewed` at which the job has to stop, because its lease is about to end."""
        self.stopped: Stop | None = None
        self._lock = threading.Lock()
        self._moved = self.started
        self._phase = Phase.FETCH
        self._prompt = 0
        self._step = 0

    @property
    def prefix(self) -> str:
        """Folder of this attempt's outputs, so that two attempts never mix their files."""
        return f"{self.claim.job.id}/{self.claim.epoch}"

    @property
    def progress(self) -> Progress:
        """The job's current progress, as the status shows it."""
        with self._lock:
            prompts = self.spec.prompts
            return Progress(
                prompt=self._prompt,
                prompts=len(prompts),
                step=self._step,
                steps=prompts[self._prompt].steps if prompts else 0,
                phase=self._phase,
            )

    def begin_prompt(self, index: int) -> None:
        """Record that prompt `index` is next."""
        with self._lock:
            self._prompt, self._step = index, 0

    def on_phase(self, phase: Phase) -> None:
        """Enter a phase. Raises `Stopped` if the job has to stop."""
        with self._lock:
            self._phase, self._moved = phase, time.monotonic()
        self.check()

    def on_step(self, done: int, total: int) -> None:
        """Record that `done` of `total` denoising steps are done. Raises `Stopped` if the job has to stop."""
        with self._lock:
            self._step, self._moved = min(done, total), time.monotonic()
        self.check()

    def moved(self) -> None:
        """Record progress within the current phase. Raises `Stopped` if the job has to stop."""
        with self._lock:
            self._moved = time.monotonic()
        self.check()

    def stop(self, reason: Stop) -> None:
        """Ask the job to stop at its next step."""
        with self._lock:
            if self.stopped is None or reason is Stop.LEASE_LOST:
                self.stopped = reason

    def fail(self, failure: JobFailure) -> None:
        """Record why the job failed. The first failure wins."""
        with self._lock:
            self.failure = self.failure or failure.without_frames()

    def check(self) -> None:
        """Raise `Stopped` if the job has to stop or has failed on another thread."""
        if time.monotonic() - self.renewed > self.unrenewed_s:
            self.stop(Stop.LEASE_LOST)
        if self.stopped is not None or self.failure is not None:
            raise Stopped

    def stalled(self, limits: Mapping[Phase, float]) -> bool:
        """Return whether the current phase has made no progress within its limit."""
        with self._lock:
            return time.monotonic() - self._moved > limits[self._phase]
