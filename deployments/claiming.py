"""The claim loop: load the pipeline, then claim, render, hand over to publishing, and again.

Everything here runs on the one thread that touches the device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future

from cluster.jobs import Claim, FailureCode, JobFailure, Phase, StoreUnavailable
from cluster.objects import ObjectStore
from cluster.queue import JobQueue
from cluster.secrets import open_secret
from cluster.telemetry import redact
from deployments.controls import Controls
from deployments.engine import Engine
from deployments.heartbeat import Heartbeat, end_process
from deployments.loras.sources import Loras
from deployments.publish import Publisher
from deployments.render import join_secrets
from deployments.rendering import Report, render_job
from deployments.running import Run, Stop, Stopped

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.5
"""Longest sleep between two looks at the queue: jobs that become claimable by time alone change no table."""

PATIENCE_S = 1.0
"""How long a job waits for a replica that holds its LoRA before another takes it: about one LoRA load."""

EXIT_POISONED = 17
"""Exit status of a worker whose device no longer answers."""

EXIT_BROKEN = 19
"""Exit status of a worker whose claim loop met an error that it does not know."""

LOAD_RETRY_S = 10.0
"""Pause after a pipeline failed to load."""


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
        self._known: dict[str, frozenset[str]] = {}
        self._draining = threading.Event()
        self.loaded = threading.Event()
        self.warm: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._main, name="render", daemon=True)

    def start(self) -> None:
        """Begin to load, then to claim."""
        self._thread.start()

    def drain(self, patience_s: float) -> None:
        """Claim nothing more; give running jobs `patience_s` seconds, then release them to the queue."""
        self._draining.set()
        self._thread.join(timeout=max(patience_s, 0.0))
        for run in list(self._runs):
            run.stop(Stop.RELEASED)
        self._thread.join()

    def _main(self) -> None:
        try:
            self._load()
            watch = self._queue.watch()
            while not self._draining.is_set():
                claim = self._claim(self.warm)
                if claim is None:
                    watch.wait(IDLE_POLL_S)
                else:
                    self._perform(claim)
            watch.close()
            self._publisher.close()
        except Exception:
            logger.exception("the claim loop of %s broke; ending", self._model)
            end_process(EXIT_BROKEN)

    def _load(self) -> None:
        """Load until it works. While it does not, waiting jobs are told so, attempt by attempt."""
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

    def _claim(self, warm: Collection[str]) -> Claim | None:
        try:
            return self._queue.claim(self._model, self._owner, warm=warm, patience_s=PATIENCE_S)
        except StoreUnavailable:
            logger.warning("the job table is away; %s waits", self._owner)
            return None

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
        begun = time.monotonic()
        try:
            self._render(run, report)
        except Stopped:
            pass
        except JobFailure as failure:
            run.fail(failure)
        except Exception:
            self._diagnose(run)
        self._note_warm(run, report)
        # One job renders while one is published, never more: wait for the one before.
        if self._publishing is not None:
            self._publishing.result()
        result = {
            "inference_time": time.monotonic() - begun,
            "timings": report.timings,
            "warnings": report.warnings,
        }
        self._publishing = self._publisher.settle(run, result)

    def _render(self, run: Run, report: Report) -> None:
        secrets = open_secret(run.claim.secret) if run.claim.secret else {}
        rendered = render_job(
            self._engine,
            join_secrets(run.spec, secrets.get("queries", ())),
            loras=self._loras,
            controls=self._controls,
            observer=run,
            report=report,
            skip=run.claim.done,
            hf_token=secrets.get("hf_token"),
        )
        for item in rendered:
            manifest = {"request_id": run.claim.job.id, "prompt_index": item.index, **item.manifest}
            self._publisher.publish(run, item.index, item.media, manifest)
        run.on_phase(Phase.PUBLISH)

    def _diagnose(self, run: Run) -> None:
        """Fail the run; if the device no longer answers, settle it and end this process."""
        logger.exception("job %s failed", run.claim.job.id)
        try:
            self._engine.probe()
        except Exception:
            logger.exception("the device does not answer; ending")
            run.fail(JobFailure(FailureCode.DEVICE_FAULT, "the device failed during the job", retry=True))
            self._publisher.settle(run, {}).result()
            end_process(EXIT_POISONED)
        run.fail(JobFailure(FailureCode.INTERNAL_ERROR, "the job failed in the pipeline", retry=True))

    def _note_warm(self, run: Run, report: Report) -> None:
        """Update which LoRA sets are resident; the heartbeat tells the other replicas of the model."""
        resident = self._engine.warm
        known = self._known | {run.spec.adapter: report.adapters}
        self._known = {key: hashes for key, hashes in known.items() if hashes and hashes <= resident}
        self.warm = frozenset(self._known)
