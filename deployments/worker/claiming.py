"""The claim loop: loads the pipeline, then claims a job, renders it, hands it to the publisher, and repeats.

The loop has its own thread, the only one that renders.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import ExitStack

from cluster.failures import FailureCode, JobFailure, StoreUnavailable
from cluster.jobs.claims import Answer, Offer, take_any
from cluster.jobs.model import Claim, Job, Phase
from cluster.jobs.queue import JobQueue
from cluster.objects.store import ObjectStore
from cluster.telemetry import redact
from deployments.engine.control_images import Controls
from deployments.engine.engine import Engine
from deployments.engine.job import Report, render_job
from deployments.loras.sources.loras import Loras
from deployments.spec.job import unseal
from deployments.worker.heartbeat import Heartbeat, end_process
from deployments.worker.patience import Patience
from deployments.worker.prefetch import Prefetcher
from deployments.worker.publish import Publisher
from deployments.worker.run import Run, Stop, Stopped

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.5
"""Longest sleep between two claims. Some jobs become claimable just by waiting, which notifies nobody."""

EXIT_POISONED = 17
"""Exit status of a worker whose device no longer computes."""

EXIT_BROKEN = 19
"""Exit status of a worker whose claim loop hit an unexpected error."""

LOAD_RETRY_S = 10.0
"""Pause before another try to load a pipeline that failed to load."""


class ClaimLoop:
    """Renders jobs of one model until drained."""

    def __init__(
        self,
        engine: Engine,
        queue: JobQueue,
        store: ObjectStore,
        heartbeat: Heartbeat,
        *,
        owner: str,
        loras: Loras,
        controls: Controls,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._heartbeat = heartbeat
        self._owner = owner
        self._loras = loras
        self._controls = controls
        self._model = engine.spec.id
        self._publisher = Publisher(queue, store, self._settled)
        self._publishing: Future[None] | None = None
        self._runs: list[Run] = []
        self._resident: dict[str, frozenset[str]] = {}
        self._draining = threading.Event()
        self._watch = queue.watch()
        self._patience = Patience()
        self._prefetcher = Prefetcher(
            loras, engine.prepare, peek_next=self._peek_next, queued=queue.queued, arrived=self._watch.wake
        )
        self.loaded = threading.Event()
        self._thread = threading.Thread(target=self._main, name="render", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the pipeline and then claims jobs."""
        self._thread.start()

    def drain(self, patience_s: float) -> None:
        """Stop claiming. Running jobs get `patience_s` seconds, then they go back to the queue."""
        self._draining.set()
        self._prefetcher.close()
        self._thread.join(timeout=max(patience_s, 0.0))
        for run in list(self._runs):
            run.stop(Stop.RELEASED)
        self._thread.join()

    @property
    def warm(self) -> frozenset[str]:
        """The LoRA sets held here or on their way. Other replicas should leave their jobs to this one."""
        return self._prefetcher.held.union(self._resident)

    def _main(self) -> None:
        try:
            self._load()
            self._prefetcher.start()
            while not self._draining.is_set():
                claim = self._claim(self.warm, self._offer)
                if claim is None:
                    self._watch.wait(IDLE_POLL_S)
                else:
                    self._perform(claim)
            self._watch.close()
            self._publisher.close()
        except Exception:
            logger.exception("the claim loop of %s failed; ending the process", self._model)
            end_process(EXIT_BROKEN)

    def _load(self) -> None:
        """Load until it works. Each failed load fails one attempt of a waiting job, with the reason."""
        while not self._draining.is_set():
            try:
                self._engine.load()
            except Exception as error:
                logger.exception("%s could not be loaded", self._model)
                message = f"the model could not be loaded: {redact(str(error))}"
                claim = self._claim(())
                if claim is not None:
                    self._fail(claim, JobFailure(FailureCode.MODEL_LOAD_FAILED, message, retry=True))
                self._draining.wait(LOAD_RETRY_S)
            else:
                self.loaded.set()
                return

    def _claim(self, warm: Collection[str], offer: Offer = take_any) -> Claim | None:
        patience_s = self._patience.seconds
        try:
            return self._queue.claim(self._model, self._owner, warm=warm, patience_s=patience_s, offer=offer)
        except StoreUnavailable:
            logger.warning("the job table is unreachable; %s claims nothing until it is back", self._owner)
            return None

    def _offer(self, job: Job, secret: str | None) -> Answer:
        return self._prefetcher.offer(job, secret, patience_s=self._patience.seconds)

    def _peek_next(self, coming: frozenset[str]) -> tuple[Job, str | None] | None:
        patience_s = self._patience.seconds
        return self._queue.peek_next(
            self._model, self._owner, warm=self.warm, patience_s=patience_s, without=coming
        )

    def _fail(self, claim: Claim, failure: JobFailure) -> None:
        run = self._begin(claim)
        run.fail(failure)
        self._publisher.settle(run, {}).result()

    def _begin(self, claim: Claim) -> Run:
        run = Run(claim)
        self._runs.append(run)
        self._heartbeat.watch(run)
        return run

    def _settled(self, run: Run) -> None:
        self._heartbeat.forget(run)
        self._runs.remove(run)

    def _perform(self, claim: Claim) -> None:
        run, report = self._begin(claim), Report()
        started = time.monotonic()
        self._prefetcher.rendering.set()
        try:
            self._render(run, report)
        except Stopped:
            pass
        except JobFailure as failure:
            run.fail(failure)
        except Exception:
            self._diagnose(run)
        if run.failure is not None and run.failure.code is FailureCode.OUT_OF_MEMORY:
            self._engine.free_memory()
        self._note_warm(run, report)
        # At most one job is published while the next one renders.
        if self._publishing is not None:
            self._publishing.result()
        self._prefetcher.rendering.clear()
        result = {
            "inference_time": time.monotonic() - started,
            "timings": report.timings,
            "warnings": report.warnings,
        }
        self._publishing = self._publisher.settle(run, result)

    def _render(self, run: Run, report: Report) -> None:
        arrival = self._prefetcher.take(run.claim.job)
        with arrival.leases if arrival else ExitStack():
            if arrival:
                report.timings["prefetch"] = arrival.seconds
            spec, hf_token = unseal(run.spec, run.claim.secret)
            rendered = render_job(
                self._engine,
                spec,
                loras=arrival or self._loras,
                controls=self._controls,
                observer=run,
                report=report,
                skip=run.claim.done,
                hf_token=hf_token,
            )
            for item in rendered:
                manifest = {"request_id": run.claim.job.id, "prompt_index": item.index, **item.manifest}
                self._publisher.publish(run, item.index, item.media, manifest)
        run.on_phase(Phase.PUBLISH)

    def _diagnose(self, run: Run) -> None:
        """Fail the run. If the device no longer computes, settle the run and end this process."""
        logger.exception("job %s failed", run.claim.job.id)
        try:
            self._engine.probe()
        except Exception:
            logger.exception("the device no longer computes; ending the process")
            run.fail(JobFailure(FailureCode.DEVICE_FAULT, "the device failed during the job", retry=True))
            self._publisher.settle(run, {}).result()
            end_process(EXIT_POISONED)
        run.fail(JobFailure(FailureCode.INTERNAL_ERROR, "the job failed in the pipeline", retry=True))

    def _note_warm(self, run: Run, report: Report) -> None:
        """Update which LoRA sets are on the device; the heartbeat announces them to the other replicas."""
        adapter, resident = run.spec.adapter, self._engine.warm
        if adapter not in self._resident and report.adapters and report.adapters <= resident:
            parts = ("prefetch", "fetch", "adapters")
            self._patience.note(sum(report.timings.get(part, 0.0) for part in parts))
        sets = self._resident | {adapter: report.adapters}
        self._resident = {key: hashes for key, hashes in sets.items() if hashes and hashes <= resident}
