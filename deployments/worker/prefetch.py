"""Brings the LoRAs of jobs to come to this node: no device waits while an origin is asked.

A job whose LoRAs have to be asked for elsewhere is not claimed before they are here: it stays in the queue,
its LoRA counts as held by this replica, and jobs behind it whose LoRA is ready go first. While a job runs,
the job that would be claimed next is looked up and its LoRAs are brought as well. What was brought is for
that one job, since each has its own rights at the origin. No failure is told before the job is claimed: then
the job fails with it, and the origin is not asked again.
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
from deployments.loras.sources.lora_root import LoraFile
from deployments.loras.sources.loras import Loras, Tick
from deployments.spec.job import LoraSpec, RenderSpec, unseal

logger = logging.getLogger(__name__)

SLOTS = 4
"""Jobs whose LoRAs are brought, or wait here, at the same time."""

FRESH_S = 60.0
"""How long what was brought waits for its job; then the origin's answer is too old."""

LOOK_S = 0.5
"""Pause between two looks at the queue while a job runs."""

Prepare: TypeAlias = Callable[[LoraFile], AbstractContextManager[None]]

PeekNext: TypeAlias = Callable[[frozenset[str]], "tuple[Job, str | None] | None"]
"""Returns the job that would be claimed next, those of the given LoRA sets left out, and its secret."""


class _Closed(Exception):
    """Ends what is being brought."""


@dataclass(slots=True)
class Arrival:
    """The LoRAs of one job, on their way here or open on this node until `leases` are closed."""

    job: Job
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    done: bool = False
    claimed: bool = False
    files: dict[LoraSpec, LoraFile] = field(default_factory=dict)
    failure: JobFailure | None = None
    leases: ExitStack = field(default_factory=ExitStack)

    def open(self, lora: LoraSpec, *, tick: Tick, token: str | None) -> AbstractContextManager[LoraFile]:
        """As `Loras.open`, which has been called already; raises the failure that it met."""
        if self.failure:
            raise self.failure
        return nullcontext(self.files[lora])


class Prefetcher:
    """Brings LoRAs with `loras`, then `prepare`, on threads of its own; thread-safe.

    `prepare` takes a file to the tiers of the engine and holds it there. `peek_next` looks at the queue while
    `rendering` is set, `queued` tells which of some jobs still wait; `arrived` is called when something has
    come. At most `SLOTS` jobs at a time have their LoRAs in use here, which budgets may be overshot by.
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
        self._bringers = ThreadPoolExecutor(SLOTS, "bring")
        self._scout = threading.Thread(target=self._look_ahead, name="scout", daemon=True)
        self.rendering = threading.Event()

    def start(self) -> None:
        """Begin to look ahead while jobs run."""
        self._scout.start()

    def close(self) -> None:
        """Bring nothing more, and let go of what is here; jobs stay in the queue."""
        with self._lock:
            self._closing.set()
        self._bringers.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for arrival in self._arrivals.values():
                if arrival.done:
                    arrival.leases.close()
            self._arrivals.clear()

    @property
    def held(self) -> frozenset[str]:
        """The LoRA sets that were brought and wait for their job, or are on their way."""
        with self._lock:
            return frozenset(arrival.job.adapter for arrival in self._arrivals.values())

    def offer(self, job: Job, secret: str | None, *, patience_s: float) -> Answer:
        """Answer for a job that is next: taken if its LoRAs are here, else they are brought.

        One job at a time, lest an idle replica bring what another could take; a further one when those on
        their way have taken longer than `patience_s`.
        """
        with self._lock:
            self._drop_old()
            if arrival := self._arrivals.get(job.id):
                arrival.claimed = arrival.done
                return Answer.TAKE if arrival.done else Answer.BRING
            try:
                spec = RenderSpec.model_validate(job.spec)
                asks_nobody = all(self._loras.opens_offline(lora) for lora in spec.loras)
            except (ValueError, OSError):
                return Answer.TAKE  # Once it is claimed it fails with a code, and that counts as an attempt.
            if asks_nobody:
                return Answer.TAKE
            return Answer.BRING if self._bring(job, spec, secret, patience_s) else Answer.LEAVE

    def take(self, job: Job) -> Arrival | None:
        """Return what was brought for a claimed job; the caller closes its leases."""
        with self._lock:
            arrival = self._arrivals.get(job.id)
            return self._arrivals.pop(job.id) if arrival and arrival.done else None

    def _look_ahead(self) -> None:
        while not self._closing.wait(LOOK_S):
            try:
                self._drop_lost()
                if self.rendering.is_set():
                    self._bring_next()
            except StoreUnavailable:
                logger.warning("the job table is away; nothing is brought ahead")
            except Exception as error:
                # The job that it met says more, once it is claimed.
                logger.warning("nothing was brought ahead: %s", type(error).__name__)

    def _bring_next(self) -> None:
        with self._lock:
            coming = frozenset(each.job.adapter for each in self._arrivals.values() if not each.done)
        if upcoming := self._peek_next(coming):
            job, secret = upcoming
            with self._lock:
                if job.id not in self._arrivals:
                    self._bring(job, RenderSpec.model_validate(job.spec), secret, patience_s=0.0)

    def _bring(self, job: Job, spec: RenderSpec, secret: str | None, patience_s: float) -> bool:
        """Begin, if there is room; the lock is held."""
        latest = time.monotonic() - patience_s
        coming = [arrival for arrival in self._arrivals.values() if not arrival.done]
        if self._closing.is_set() or len(coming) == SLOTS or any(each.begun > latest for each in coming):
            return False
        if len(self._arrivals) == SLOTS:
            self._drop(next(each for each in self._arrivals.values() if each.done))
        arrival = self._arrivals[job.id] = Arrival(job)
        self._bringers.submit(self._run, arrival, spec, secret)
        return True

    def _run(self, arrival: Arrival, spec: RenderSpec, secret: str | None) -> None:
        try:
            self._open(arrival, spec, secret)
        except JobFailure as failure:
            arrival.failure = failure
        except _Closed:
            pass
        except Exception as error:
            logger.warning("LoRAs of job %s were not brought: %s", arrival.job.id, type(error).__name__)
            message = "the job's LoRAs could not be brought to the worker"
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
        latest = time.monotonic() - FRESH_S
        for arrival in list(self._arrivals.values()):
            if arrival.done and arrival.begun + arrival.seconds < latest:
                self._drop(arrival)

    def _drop_lost(self) -> None:
        """Drop what was brought for jobs that others have claimed, or that were canceled."""
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
