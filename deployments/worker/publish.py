"""Publishes outputs on one thread while the next job renders: encode, store, record, settle.

Outputs become visible only with the write that ends the job, which fails if the lease was lost. Each attempt
stores its files under its own epoch, so a worker that lost its lease writes to a folder that nobody reads.
"""

from __future__ import annotations

import json
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.failures import FailureCode, JobFailure, StoreUnavailable
from cluster.jobs.model import JobState, LeaseLost
from cluster.jobs.queue import JobQueue
from cluster.objects.store import ObjectStore, StoreError
from deployments.engine.media import Media, save
from deployments.loras.sources.lora_file import digest
from deployments.spec.formats import FILE_TYPES
from deployments.worker.run import Run, Stop, Stopped

logger = logging.getLogger(__name__)

MEDIA_IN_HAND = 2
"""Number of rendered but unpublished media held in memory. At this limit rendering waits for the store."""

RETRY_DELAY_S = 2.0
"""Back-off before the second attempt; doubles with each further attempt."""

_TIMED_OUT = "the job ran longer than the time limit for one run"


class Publisher:
    """Puts media into the object store and settles jobs in the job table, in the order handed over."""

    def __init__(self, queue: JobQueue, store: ObjectStore, on_settled: Callable[[Run], None]) -> None:
        self._queue = queue
        self._store = store
        self._on_settled = on_settled
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._free_slots = threading.BoundedSemaphore(MEDIA_IN_HAND)

    def publish(self, run: Run, index: int, media: Media, manifest: Mapping[str, Any]) -> None:
        """Hand over one prompt's media. Blocks while `MEDIA_IN_HAND` are waiting. An error fails the run."""
        self._free_slots.acquire()
        self._thread.submit(self._publish, run, index, media, manifest)

    def settle(self, run: Run, result: Mapping[str, Any]) -> Future[None]:
        """End the job as its run ended, after publishing everything that was handed over before."""
        return self._thread.submit(self._settle, run, result)

    def close(self) -> None:
        """Publish and settle what was handed over, then return."""
        self._thread.shutdown(wait=True)

    def _publish(self, run: Run, index: int, media: Media, manifest: Mapping[str, Any]) -> None:
        try:
            run.check()
            output = self._store_output(run, index, media, manifest)
            self._persist(run, lambda: self._queue.record_output(run.claim, index, output))
        except Stopped:
            pass
        except LeaseLost:
            run.stop(Stop.LEASE_LOST)
        except StoreError as error:
            logger.warning("job %s: output %d was not stored: %s", run.claim.job.id, index, error)
            run.fail(JobFailure(FailureCode.OUTPUT_STORE_ERROR, "the output could not be stored", retry=True))
        except Exception:
            logger.exception("job %s: output %d could not be published", run.claim.job.id, index)
            run.fail(JobFailure(FailureCode.INTERNAL_ERROR, "the output could not be encoded", retry=True))
        finally:
            self._free_slots.release()

    def _store_output(
        self, run: Run, index: int, media: Media, manifest: Mapping[str, Any]
    ) -> dict[str, Any]:
        format = run.spec.output_format
        extension, content_type = FILE_TYPES[format]
        # The name cannot be guessed: anyone who has the URL can read the output.
        name = f"{run.prefix}/{index}-{secrets.token_urlsafe(16)}"
        with tempfile.TemporaryDirectory(prefix="lora-serve-") as folder:
            file = Path(folder, f"output.{extension}")
            save(media, format, manifest, file, run.moved)
            output: dict[str, Any] = {
                "kind": "image" if media.fps is None else "video",
                "format": format,
                **media.measures,
                "seed": run.spec.prompts[index].seed,
                "key": f"{name}.{extension}",
                "manifest_key": f"{name}.json",
                "sha256": digest(file),
                "bytes": file.stat().st_size,
            }
            self._store.put_file(output["key"], file, content_type)
        complete = {**manifest, "sha256": output["sha256"], "bytes": output["bytes"]}
        self._store.put(
            output["manifest_key"], json.dumps(complete, ensure_ascii=False).encode(), "application/json"
        )
        return output

    def _settle(self, run: Run, result: Mapping[str, Any]) -> None:
        try:
            self._persist(run, lambda: self._write_end(run, result))
        except (LeaseLost, Stopped):
            logger.warning("job %s: lease lost, nothing written", run.claim.job.id)
        finally:
            self._on_settled(run)

    def _write_end(self, run: Run, result: Mapping[str, Any]) -> None:
        claim, failure = run.claim, run.failure
        if run.stopped is Stop.CANCELED:
            self._queue.finish(claim, JobState.CANCELED)
        elif run.stopped is Stop.TIMED_OUT:
            self._queue.finish(
                claim, JobState.FAILED, error=_TIMED_OUT, error_code=FailureCode.INFERENCE_TIMEOUT
            )
        elif run.stopped is Stop.RELEASED:
            self._queue.release(claim)
        elif failure is None:
            self._queue.finish(claim, JobState.SUCCEEDED, result=result)
        elif failure.retry:
            delay = RETRY_DELAY_S * 2 ** (claim.job.attempts - 1)
            self._queue.retry(claim, error=failure.message, error_code=failure.code, delay_s=delay)
        else:
            self._queue.finish(claim, JobState.FAILED, error=failure.message, error_code=failure.code)

    def _persist(self, run: Run, write: Callable[[], None]) -> None:
        """Write to the job table. Retry while it is unreachable, until the heartbeat gives the lease up."""
        while True:
            if run.stopped is Stop.LEASE_LOST:
                raise LeaseLost
            try:
                write()
                return
            except StoreUnavailable:
                time.sleep(0.5)
