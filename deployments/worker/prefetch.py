"""Prefetches the LoRAs of upcoming jobs, so that the device never waits for a download.

A job whose LoRAs need the network is not claimed until they are here. It stays in the queue, its LoRA set
counts as held by this replica, and later jobs whose LoRAs are ready go first. While a job runs, the replica
also looks up the job that it would claim next and fetches that job's LoRAs.

Fetched LoRAs serve only the job that they were fetched for, since each job has its own access rights at the
origin. A failure is kept until the job is claimed. Then the job fails with it, without a second request to
the origin.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from cluster.failures import FailureCode, JobFailure, StoreUnavailable
from cluster.jobs.claims import Answer
from cluster.jobs.model import Job
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.loras import Loras, Tick
from deployments.spec.job import LoraSpec, RenderSpec, unseal

logger = logging.getLogger(__name__)

SLOTS = 4
"""Number of jobs whose LoRAs may be on their way or waiting here at the same time."""

FRESH_S = 60.0
"""How long fetched LoRAs wait for their job. After that the origin's answer is too old."""

LOOK_S = 0.5
"""Pause between two looks at the queue."""

Prepare: TypeAlias = Callable[[LoraFile], AbstractContextManager[None]]

PeekNext: TypeAlias = Callable[[frozenset[str]], "tuple[Job, str | None] | None"]
"""Returns the next job outside the given LoRA sets and its secret, or None; claims nothing."""


class _Closed(Exception):
    """Raised into a running fetch to end it."""


@dataclass(slots=True)
class Arrival:
    """The LoRAs of one job: on their way, or open on this node until `leases` is closed."""

    job: Job
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    done: bool = False
    claimed: bool = False
    files: dict[LoraSpec, LoraFile] = field(default_factory=dict)
    failure: JobFailure | None = None
    leases: ExitStack = field(default_factory=ExitStack)

    def open(self, lora: LoraSpec, *, tick: Tick, token: str | None) -> AbstractContextManager[LoraFile]:
        """Return a file that is already open, as `Loras.open` would, or raise the failure of the fetch."""
        if self.failure:
            raise self.failure from None
        return nullcontext(self.files[lora])


class Prefetcher:
    """Fetches LoRAs with `loras`, then preloads them with `prepare`, on its own threads. Thread-safe.

    `prepare` loads a file into the engine's memory tiers and holds it there. `peek_next` looks at the queue
    while `rendering` is set. `queued` returns which of the given jobs still wait. `arrived` is called after
    each fetch. The LoRAs of up to `SLOTS` jobs are in use here at a time, so memory budgets may be exceeded
    by that much.
    """

    def __init__(
        self,
        loras: Loras,
        prepare: Prepare,
        *,
        peek_next: PeekNext,
        queued: Callable[[Collection[str]], set[str]],
        arrived: Callable[[], None],
    ) -> None:
        self._loras = loras
        self._prepare = prepare
        self._peek_next = peek_next
        self._queued = queued
        self._arrived = arrived
        self._lock = threading.Lock()
        self._arrivals: dict[str, Arrival] = {}
        self._closing = threading.Event()
        self._fetchers = ThreadPoolExecutor(SLOTS, "prefetch")
        self._scout = threading.Thread(target=self._look_ahead, name="scout", daemon=True)
        self.rendering = threading.Event()

    def start(self) -> None:
        """Start to look ahead while jobs run."""
        self._scout.start()

    def close(self) -> None:
        """Stop fetching and release everything held here. The jobs stay in the queue."""
        with self._lock:
            self._closing.set()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for arrival in self._arrivals.values():
                if arrival.done:
                    arrival.leases.close()
            self._arrivals.clear()

    @property
    def held(self) -> frozenset[str]:
        """The LoRA sets that wait here for their job or are on their way."""
        with self._lock:
            return frozenset(arrival.job.adapter for arrival in self._arrivals.values())

    def offer(self, job: Job, secret: str | None, *, patience_s: float) -> Answer:
        """Return TAKE if the job's LoRAs are here, BRING if they are on their way now, else LEAVE.

        Fetches for one job at a time, since other replicas may hold the LoRAs of the next jobs. Starts
        another fetch only when all fetches under way have taken longer than `patience_s`.
        """
        with self._lock:
            self._drop_old()
            if arrival := self._arrivals.get(job.id):
                arrival.claimed = arrival.done
                return Answer.TAKE if arrival.done else Answer.BRING
            try:
                spec = RenderSpec.model_validate(job.spec)
                offline = all(self._loras.opens_offline(lora) for lora in spec.loras)
            except (ValueError, OSError):
                return Answer.TAKE  # Claimed, the job fails with an error code, which counts as an attempt.
            if offline:
                return Answer.TAKE
            return Answer.BRING if self._start_fetch(job, spec, secret, patience_s) else Answer.LEAVE

    def take(self, job: Job) -> Arrival | None:
        """Return the arrival of a claimed job, or None. The caller closes its leases."""
        with self._lock:
            arrival = self._arrivals.get(job.id)
            return self._arrivals.pop(job.id) if arrival and arrival.done else None

    def _look_ahead(self) -> None:
        while not self._closing.wait(LOOK_S):
            try:
                self._drop_lost()
                if self.rendering.is_set():
                    self._fetch_next()
            except StoreUnavailable:
                logger.warning("the job table is unreachable; nothing is prefetched")
            except Exception as error:
                # Only the type: the job reports the details once it is claimed.
                logger.warning("nothing was prefetched: %s", type(error).__name__)

    def _fetch_next(self) -> None:
        with self._lock:
            arriving = frozenset(each.job.adapter for each in self._arrivals.values() if not each.done)
        if upcoming := self._peek_next(arriving):
            job, secret = upcoming
            with self._lock:
                if job.id not in self._arrivals:
                    self._start_fetch(job, RenderSpec.model_validate(job.spec), secret, patience_s=0.0)

    def _start_fetch(self, job: Job, spec: RenderSpec, secret: str | None, patience_s: float) -> bool:
        """Start a fetch if there is a free slot and return whether it started. The caller holds the lock."""
        cutoff = time.monotonic() - patience_s
        arriving = [arrival for arrival in self._arrivals.values() if not arrival.done]
        if self._closing.is_set() or len(arriving) == SLOTS or any(each.begun > cutoff for each in arriving):
            return False
        if len(self._arrivals) == SLOTS:
            self._drop(next(each for each in self._arrivals.values() if each.done))
        arrival = self._arrivals[job.id] = Arrival(job)
        self._fetchers.submit(self._run, arrival, spec, secret)
        return True

    def _run(self, arrival: Arrival, spec: RenderSpec, secret: str | None) -> None:
        try:
            self._open(arrival, spec, secret)
        except JobFailure as failure:
            arrival.failure = failure.without_frames()
        except _Closed:
            pass
        except Exception as error:
            logger.warning("the LoRAs of job %s were not fetched: %s", arrival.job.id, type(error).__name__)
            message = "the job's LoRAs could not be fetched by the worker"
            arrival.failure = JobFailure(FailureCode.INTERNAL_ERROR, message, retry=True)
        with self._lock:
            arrival.seconds, arrival.done = time.monotonic() - arrival.begun, True
            if self._closing.is_set():
                arrival.leases.close()
        self._arrived()

    def _open(self, arrival: Arrival, spec: RenderSpec, secret: str | None) -> None:
        spec, token = unseal(spec, secret)
        for lora in spec.loras:
            opened = self._loras.open(lora, tick=self._tick, token=token)
            file = arrival.files[lora] = arrival.leases.enter_context(opened)
            with self._loras.suspects.trying(file.sha256) as harmless:
                if harmless:
                    arrival.leases.enter_context(self._prepare(replace(file, expert=lora.transformer)))

    def _tick(self) -> None:
        if self._closing.is_set():
            raise _Closed

    def _drop_old(self) -> None:
        cutoff = time.monotonic() - FRESH_S
        for arrival in list(self._arrivals.values()):
            if arrival.done and arrival.begun + arrival.seconds < cutoff:
                self._drop(arrival)

    def _drop_lost(self) -> None:
        """Drop the LoRAs of jobs that were canceled or that other replicas have claimed."""
        with self._lock:
            self._drop_old()
            waiting = [each for each in self._arrivals.values() if each.done and not each.claimed]
        queued = self._queued([each.job.id for each in waiting]) if waiting else set()
        with self._lock:
            for arrival in waiting:
                lost = arrival.job.id not in queued and not arrival.claimed
                if lost and self._arrivals.get(arrival.job.id) is arrival:
                    self._drop(arrival)

    def _drop(self, arrival: Arrival) -> None:
        self._arrivals.pop(arrival.job.id).leases.close()
