"""A service under faults: two models, jobs of several lengths, and checks of every accepted job."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cluster.failures import StoreUnavailable
from cluster.jobs.model import Job, JobState
from cluster.jobs.queue import JobQueue
from cluster.objects.opening import open_store
from cluster.objects.store import ObjectStore
from tests.faults.contract import check_contract
from tests.parity.cases import FOLDER
from tests.support.service import (
    descendants,
    edited_config,
    free_port,
    redeploy,
    replica_pids,
    serve_run,
    submit,
    wait_until,
)

MODELS = ("flux", "sd15")

LONG_SIDES = {"flux": 512, "sd15": 192}
"""At these sizes a step of the tiny models takes about 30 ms."""

GRACE_S = 120.0


def body(
    model: str = "flux", *, steps: int = 2, side: int = 64, seeds: tuple[int, ...] = (1,)
) -> dict[str, Any]:
    """Return a request for small pictures, one per seed."""
    prompt = {"prompt": "a long road", "width": side, "height": side, "sample_steps": steps}
    prompts = [{**prompt, "seed": seed} for seed in seeds]
    return {"model": model, "loras": [{"path": f"{model}.safetensors"}], "prompts": prompts}


def long_body(model: str = "flux", *, steps: int = 100, prompts: int = 1) -> dict[str, Any]:
    """Return a request that runs for some seconds."""
    return body(model, steps=steps, side=LONG_SIDES[model], seeds=tuple(range(1, prompts + 1)))


OUTCOMES: list[tuple[int, float | None]] = []
"""For each fault in the current test: the number of jobs that ended after it began, and the seconds until the
first job ran again, or None if none had to."""


@dataclass
class Service:
    client: httpx.Client
    queue: JobQueue
    store: ObjectStore
    folder: Path
    port: int
    lease_s: float
    accepted: list[str] = field(default_factory=list)

    def submit(self, request: Mapping[str, Any], **headers: str) -> str:
        """Submit a request that must be accepted; `kept` checks its contract."""
        job_id = submit(self.client, request, **headers)
        self.accepted.append(job_id)
        return job_id

    def job(self, job_id: str) -> Job:
        job = self.queue.get(job_id)
        assert job is not None
        return job

    def worker_of(self, job_id: str) -> int | None:
        """Return the pid of the worker that runs the job now, from its owner."""
        job = self.job(job_id)
        running = job.state is JobState.IN_PROGRESS and job.owner is not None
        return int(job.owner.split(":")[1]) if running and job.owner else None

    def running(self, job_id: str, step: int = 2, timeout_s: float = 120) -> int:
        """Wait until the current run of the job has made some steps; return its worker's pid."""

        def probe() -> int | None:
            progress = self.job(job_id).progress
            return self.worker_of(job_id) if progress is not None and progress.step >= step else None

        return wait_until(probe, timeout_s, f"the start of job {job_id}")

    def warm_worker(self) -> int:
        """Return the pid of a worker that has just finished a job and waits for the next."""
        job_id = self.submit(body())
        wait_until(lambda: self.job(job_id).state.terminal, 120, "the end of a first job")
        return int((self.job(job_id).owner or "").split(":")[1])

    def gateway(self) -> int:
        return wait_until(lambda: replica_pids("gateway"), 30, "the gateway's start")[0]

    def answers(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def redeploy(self, models: tuple[str, ...] = MODELS, **options: Any) -> None:
        redeploy(worker_config(self.port, self.lease_s, models, **options), self.folder)

    def said(self, words: str) -> int:
        """Return how often `words`, a regular expression, matches in the service's log."""
        return len(re.findall(words, (self.folder / "serve.log").read_text(errors="replace")))

    def kept(
        self, since: float, *, recovery_s: float | None = None, timeout_s: float = 240
    ) -> dict[str, Job]:
        """Wait until all accepted jobs have ended and check the contract of each; then forget them.

        `since` is when the fault began, in seconds since the epoch. `OUTCOMES` records the time from then to
        the first claim, or `recovery_s` if given.
        """
        ids, self.accepted = self.accepted, []
        wait_until(lambda: self._ended(ids), timeout_s, "the end of all jobs")
        ended = {job_id: check_contract(self.queue, self.store, job_id) for job_id in ids}
        if recovery_s is None:
            events = [event for job_id in ids for event in self.queue.events(job_id)]
            claims = [event.at for event in events if event.state is JobState.IN_PROGRESS]
            recovery_s = min((at - since for at in claims if at > since), default=None)
        in_flight = sum((job.finished_at or 0.0) > since for job in ended.values())
        OUTCOMES.append((in_flight, recovery_s))
        return ended

    def _ended(self, ids: list[str]) -> bool:
        try:
            return self.queue.finished(ids) == set(ids)
        except StoreUnavailable:
            return False  # Our own connections may be older than the fault.


def worker_config(port: int, lease_s: float, models: tuple[str, ...] = MODELS, **options: Any) -> str:
    scaling = {name: options.pop(name) for name in ("downscale_to_zero_delay_s", "policy") if name in options}
    arguments = {"lease_s": lease_s, "adapter_bytes": options.pop("adapter_bytes", 1 << 30)}
    return edited_config(
        list(models),
        port,
        args=arguments,
        options={"graceful_shutdown_timeout_s": GRACE_S, **options},
        max_replicas=1,
        downscale_delay_s=5.0,
        **{"downscale_to_zero_delay_s": 60.0, **scaling},
    )


@contextmanager
def serving(
    folder: Path, checkpoints: Path, *, lease_s: float, environment: Mapping[str, str]
) -> Iterator[Service]:
    """Run a service with one LoRA per model, named after it; `environment` also locates its store."""
    loras = folder / "loras"
    loras.mkdir(exist_ok=True)
    for model in MODELS:
        file = next((FOLDER / model / "lora").glob("*.safetensors"))
        shutil.copy(file, loras / f"{model}.safetensors")
    own = {"CHECKPOINTS_PATH": str(checkpoints), "WORKFLOWS_BASE_PATH": str(loras), **environment}
    port = free_port()
    with serve_run(worker_config(port, lease_s), port, folder, own) as client:
        queue, store = JobQueue(own["JOBS_URL"]), open_store(own["OUTPUT_BASE_PATH"])
        yield Service(client, queue, store, folder, port, lease_s)
        queue.close()


def kill_all(pid: int) -> None:
    """Kill a process and all its descendants, as the loss of their machine does."""
    for each in (pid, *descendants(pid)):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_unless_last_attempt(service: Service, model: str) -> None:
    """Kill a worker of the model, but not on a third attempt: a third loss would rightly fail the job."""

    def killed() -> bool:
        pids = replica_pids(model)
        running = [job for job_id in service.accepted if (job := service.job(job_id)).model == model]
        if not pids or any(job.state is JobState.IN_PROGRESS and job.attempts == 3 for job in running):
            return False
        os.kill(pids[0], signal.SIGKILL)
        return True

    wait_until(killed, 120, f"a worker of {model} that may be killed")
