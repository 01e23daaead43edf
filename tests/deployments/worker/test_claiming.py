"""A worker without Ray: claim, render, publish and settle with the real engine, table and store."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.failures import FailureCode
from cluster.jobs.model import Job, JobState, NewJob
from cluster.jobs.queue import JobQueue
from cluster.objects.directory import DirectoryStore
from cluster.objects.store import StoreError
from cluster.secrets import seal
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine, Observer
from deployments.engine.media import Media
from deployments.engine.tiny import write_tiny_lora
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec
from deployments.spec.lora_reference import parse
from deployments.worker import claiming, publish
from deployments.worker.claiming import EXIT_POISONED, ClaimLoop
from deployments.worker.heartbeat import EXIT_STALLED, Heartbeat
from deployments.worker.run import Stop
from serve_app.cli.render import open_sources
from serve_app.settings import Settings
from tests.support.service import wait_until
from tests.support.web import answer, serving_site

LEASE_S = 3.0


@dataclass
class Worker:
    """A claim loop with its heartbeat; started by `start`, stopped by the fixture."""

    queue: JobQueue
    store: DirectoryStore
    loras: Path
    checkpoints: Path
    owner: str = "worker@test:1:a"
    engine: Engine | None = None
    hosts: tuple[str, ...] = ()
    loop: ClaimLoop = field(init=False)
    heartbeat: Heartbeat = field(init=False)

    def start(self, engine: Engine | None = None) -> None:
        engine = engine or Engine(CATALOG["flux"], Checkpoints(self.checkpoints, None), device="cpu")
        self.heartbeat = Heartbeat(
            self.queue, self.owner, "flux", warm=lambda: self.loop.warm, lease_s=LEASE_S
        )
        settings = Settings.model_validate(
            {"loras": self.loras, "lora_cache": self.loras.parent / "cache", "fetch_hosts": self.hosts}
        )
        loras, controls = open_sources(settings, self.store)
        self.loop = ClaimLoop(
            engine,
            self.queue,
            self.store,
            self.heartbeat,
            owner=self.owner,
            loras=loras,
            controls=controls,
        )
        self.heartbeat.start()
        self.loop.start()

    def submit(self, lora: str = "a", **fields: Any) -> str:
        """Queue a job of small pictures, one per seed."""
        seeds, secret = fields.pop("seeds", (1,)), fields.pop("secret", None)
        format_ = fields.pop("output_format", "png")
        defaults = {"prompt": "a road", "neg": "", "width": 64, "height": 64, "steps": 2, "guidance": 4.0}
        prompts = tuple(PromptSpec(**{**defaults, **fields}, seed=seed) for seed in seeds)
        loras = (LoraSpec(path=parse(f"{lora}.safetensors")),)
        spec = RenderSpec(model="flux", loras=loras, prompts=prompts, output_format=format_)
        job = NewJob(
            id=str(uuid.uuid4()),
            model="flux",
            spec=spec.model_dump(mode="json"),
            adapter=spec.adapter,
            secret=secret,
        )
        return self.queue.submit([job])[0].id

    def job(self, job_id: str) -> Job:
        job = self.queue.get(job_id)
        assert job is not None
        return job

    def ended(self, job_id: str, timeout_s: float = 60) -> Job:
        wait_until(lambda: self.job(job_id).state.terminal, timeout_s, f"the end of {job_id}")
        return self.job(job_id)

    def running(self, job_id: str) -> Job:
        """Wait until the heartbeat has reported a step."""

        def probe() -> bool:
            progress = self.job(job_id).progress
            return progress is not None and progress.step > 0

        wait_until(probe, 60, f"the start of {job_id}")
        return self.job(job_id)


@pytest.fixture
def worker(tmp_path: Path, checkpoints: Path) -> Iterator[Worker]:
    torch.set_num_threads(1)
    for seed, name in enumerate("ab"):
        write_tiny_lora(tmp_path / "loras" / f"{name}.safetensors", seed=seed)
    queue = JobQueue(f"sqlite:///{tmp_path}/jobs.db", lease_s=LEASE_S)
    made = Worker(queue, DirectoryStore(tmp_path / "outputs"), tmp_path / "loras", checkpoints)
    yield made
    if hasattr(made, "loop"):
        made.loop.drain(0)
        made.heartbeat.close()
    queue.close()


LONG: dict[str, Any] = {"width": 256, "height": 256, "steps": 150}


def test_a_job_becomes_pictures_with_their_manifests(worker: Worker) -> None:
    job_id = worker.submit(seeds=(1, 2))
    worker.start()
    job = worker.ended(job_id)
    assert (job.state, job.attempts, job.error) == (JobState.SUCCEEDED, 1, None)
    outputs = worker.queue.outputs(job_id)
    assert [output["seed"] for output in outputs] == [1, 2]
    pictures = []
    for output in outputs:
        path = worker.store.local_path(output["key"])
        assert path is not None and path.stat().st_size == output["bytes"]
        with Image.open(path) as image:
            inside = json.loads(image.text["lora-serve"])  # type: ignore[attr-defined]
            pictures.append(np.asarray(image))
        beside = json.loads(worker.store.get(output["manifest_key"]))
        assert beside == {**inside, "sha256": output["sha256"], "bytes": output["bytes"]}
        assert beside["request_id"] == job_id
        assert beside["loras"][0]["path"] == "a.safetensors"
        assert beside["parameters"]["steps"] == 2
    assert (pictures[0] != pictures[1]).any()
    assert job.result is not None and len(job.result["timings"]["prompts"]) == 2


def test_equal_jobs_give_equal_bytes_whatever_ran_between(worker: Worker) -> None:
    worker.start()
    ids = [worker.submit(lora) for lora in "aba"]
    hashes = []
    for job_id in ids:
        worker.ended(job_id)
        output = worker.queue.outputs(job_id)[0]
        path = worker.store.local_path(output["key"])
        assert path is not None
        with Image.open(path) as image:
            hashes.append(np.asarray(image).tobytes())
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_lora_from_a_url_renders_as_the_local_one(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RETRY_DELAY_S", 0.1)
    with serving_site() as site:
        site.file("/x.safetensors", (worker.loras / "a.safetensors").read_bytes())
        site.pages["/sick.safetensors"] = lambda request: answer(request, 503)
        worker.hosts = (site.host,)
        worker.start()
        jobs = {
            name: worker.submit(name) for name in ("a", site.url("/x"), site.url("/y"), site.url("/sick"))
        }
        ended = [worker.ended(job_id) for job_id in jobs.values()]
    local, fetched = (worker.queue.outputs(job.id)[0] for job in ended[:2])
    manifests = [json.loads(worker.store.get(output["manifest_key"])) for output in (local, fetched)]
    assert manifests[0]["loras"][0]["sha256"] == manifests[1]["loras"][0]["sha256"]
    paths = [worker.store.local_path(output["key"]) for output in (local, fetched)]
    pictures = [np.asarray(Image.open(path)) for path in paths if path]
    assert (pictures[0] == pictures[1]).all()
    assert [(job.error_code, job.attempts) for job in ended[2:]] == [
        ("LORA_NOT_FOUND", 1),
        ("LORA_UNREACHABLE", 3),
    ]
    assert worker.loop.warm == {":a.safetensors", f":{site.url('/x.safetensors')}"}


def test_a_slow_download_holds_up_no_job_whose_lora_is_here(worker: Worker) -> None:
    data, gate = (worker.loras / "b.safetensors").read_bytes(), threading.Event()

    def page(request: BaseHTTPRequestHandler) -> None:
        gate.wait(60)
        answer(request, 200, data)

    with serving_site() as site:
        site.pages["/slow.safetensors"] = page
        worker.hosts = (site.host,)
        worker.start()
        slow = worker.submit(site.url("/slow"))
        wait_until(lambda: site.count("/slow.safetensors"), 60, "the download")
        assert worker.ended(worker.submit("a")).state is JobState.SUCCEEDED
        assert worker.job(slow).state is JobState.IN_QUEUE
        gate.set()
        job = worker.ended(slow)
        assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)
        assert site.count("/slow.safetensors") == 1


def test_the_next_lora_comes_while_a_job_renders(worker: Worker) -> None:
    with serving_site() as site:
        site.file("/next.safetensors", (worker.loras / "b.safetensors").read_bytes())
        worker.hosts = (site.host,)
        worker.start()
        running = worker.submit(**LONG)
        worker.running(running)
        following = worker.submit(site.url("/next"))
        missing = worker.submit(site.url("/missing"))
        wait_until(lambda: site.count("/next.safetensors"), 30, "the download")
        assert worker.job(running).state is JobState.IN_PROGRESS
        worker.queue.cancel(running)
        job = worker.ended(following)
        assert job.state is JobState.SUCCEEDED
        assert job.result is not None and job.result["timings"]["prefetch"] > 0
        assert worker.ended(missing).error_code == FailureCode.LORA_NOT_FOUND
    assert [site.count(f"/{name}.safetensors") for name in ("next", "missing")] == [1, 1]


def test_a_sealed_query_reaches_the_origin_and_nothing_else(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SECRET_KEY", "a phrase of more than thirty-two characters")
    data, signature = (worker.loras / "a.safetensors").read_bytes(), "?signature=5ecret5ecret"

    def page(request: BaseHTTPRequestHandler) -> None:
        signed = request.path.endswith(signature)
        answer(request, 200 if signed else 403, data if signed else b"")

    with serving_site() as site:
        site.pages["/x.safetensors"] = page
        worker.hosts = (site.host,)
        worker.start()
        url = site.url("/x")
        unsigned = worker.ended(worker.submit(url))
        signed = worker.ended(worker.submit(url, secret=seal({"queries": [signature]})))
    assert unsigned.error_code == FailureCode.LORA_ACCESS_DENIED
    assert signed.state is JobState.SUCCEEDED
    manifest = worker.store.get(worker.queue.outputs(signed.id)[0]["manifest_key"])
    assert b"5ecret" not in manifest
    assert "5ecret" not in caplog.text


def test_a_job_whose_secrets_cannot_be_read_fails(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "a phrase of more than thirty-two characters")
    secret = seal({"hf_token": "hf_0123456789"})
    monkeypatch.setenv("SECRET_KEY", "another phrase of more than thirty-two characters")
    worker.start()
    job = worker.ended(worker.submit(secret=secret))
    assert (job.state, job.error_code) == (JobState.FAILED, FailureCode.SECRET_UNREADABLE)
    assert worker.ended(worker.submit()).state is JobState.SUCCEEDED


def test_a_running_job_is_canceled_at_its_next_step(worker: Worker) -> None:
    worker.start()
    job_id = worker.submit(**LONG)
    worker.running(job_id)
    assert worker.queue.cancel(job_id)
    asked = time.monotonic()
    job = worker.ended(job_id)
    assert job.state is JobState.CANCELED
    assert time.monotonic() - asked < 5
    follower = worker.submit()
    assert worker.ended(follower).state is JobState.SUCCEEDED


def test_a_run_stops_by_itself_when_its_lease_is_about_to_end(worker: Worker) -> None:
    """The heartbeat may be blocked, for example by a database that hangs."""
    worker.start()
    job_id = worker.submit(**LONG)
    worker.running(job_id)
    (run,) = worker.loop._runs
    run.unrenewed_s = 0.0
    wait_until(lambda: run not in worker.loop._runs, 10, "the end of the run")
    assert run.stopped is Stop.LEASE_LOST
    assert worker.job(job_id).state is JobState.IN_PROGRESS, "nothing is written without a lease"


def test_a_run_past_its_time_limit_fails(worker: Worker, tmp_path: Path) -> None:
    worker.queue.close()
    worker.queue = JobQueue(f"sqlite:///{tmp_path}/jobs.db", lease_s=LEASE_S, run_timeout_s=1.0)
    worker.start()
    job = worker.ended(worker.submit(**{**LONG, "width": 512, "height": 512}))
    assert (job.state, job.error_code) == (JobState.FAILED, FailureCode.INFERENCE_TIMEOUT)


def test_drain_finishes_the_job_when_there_is_time(worker: Worker) -> None:
    worker.start()
    job_id = worker.submit(width=256, height=256, steps=30)
    worker.running(job_id)
    worker.loop.drain(60)
    assert worker.job(job_id).state is JobState.SUCCEEDED


def test_drain_releases_the_job_when_there_is_none(worker: Worker) -> None:
    worker.start()
    job_id = worker.submit(**LONG)
    worker.running(job_id)
    waiting = worker.submit()
    worker.loop.drain(0.1)
    job = worker.job(job_id)
    assert (job.state, job.attempts) == (JobState.IN_QUEUE, 0)
    assert worker.job(waiting).attempts == 0


def test_a_missing_lora_fails_the_job_at_once(worker: Worker) -> None:
    worker.start()
    job = worker.ended(worker.submit("nowhere"))
    assert (job.state, job.error_code, job.attempts) == (JobState.FAILED, FailureCode.LORA_NOT_FOUND, 1)


def test_a_model_that_does_not_load_is_told_to_its_jobs(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LOAD_RETRY_S", 0.1)
    monkeypatch.setattr(publish, "RETRY_DELAY_S", 0.1)
    worker.checkpoints = tmp_path / "empty"
    job_id = worker.submit()
    worker.start()
    job = worker.ended(job_id)
    assert (job.error_code, job.attempts) == (FailureCode.MODEL_LOAD_FAILED, 3)
    assert job.error is not None and "FLUX.1-dev" in job.error


class FullStore(DirectoryStore):
    """A directory on a disk that is full for the first few writes."""

    def __init__(self, root: Path, refusals: int) -> None:
        super().__init__(root)
        self.refusals = refusals

    def put(self, key: str, data: bytes, content_type: str) -> None:
        if self.refusals:
            self.refusals -= 1
            raise StoreError("no space left on device")
        super().put(key, data, content_type)


def test_a_store_that_recovers_costs_an_attempt_not_the_job(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "RETRY_DELAY_S", 0.1)
    worker.store = FullStore(tmp_path / "outputs", refusals=1)
    worker.start()
    job = worker.ended(worker.submit())
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 2)


def test_a_store_that_stays_full_fails_the_job_with_its_code(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "RETRY_DELAY_S", 0.1)
    worker.store = FullStore(tmp_path / "outputs", refusals=1_000)
    worker.start()
    job_id = worker.submit()
    job = worker.ended(job_id)
    assert (job.error_code, job.attempts) == (FailureCode.OUTPUT_STORE_ERROR, 3)
    assert worker.queue.outputs(job_id) == []


class FaultyEngine(Engine):
    """A real engine whose device fails where a test says."""

    def __init__(
        self, checkpoints: Path, faults: Sequence[Exception | None], *, poisoned: bool = False
    ) -> None:
        super().__init__(CATALOG["flux"], Checkpoints(checkpoints, None), device="cpu")
        self.faults = list(faults)
        self.rendered: list[int] = []
        self.poisoned = poisoned

    def render(self, prompt: PromptSpec, controls: Sequence[Image.Image], observer: Observer) -> Media:
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        self.rendered.append(prompt.seed)
        return super().render(prompt, controls, observer)

    def probe(self) -> None:
        if self.poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        super().probe()


def test_prompts_of_an_earlier_attempt_are_not_rendered_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "RETRY_DELAY_S", 0.1)
    engine = FaultyEngine(worker.checkpoints, [None, RuntimeError("broken")])
    worker.start(engine)
    job_id = worker.submit(seeds=(1, 2, 3))
    job = worker.ended(job_id)
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 2)
    assert engine.rendered == [1, 2, 3]
    assert [output["seed"] for output in worker.queue.outputs(job_id)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("faults", "state", "code"),
    [(1, JobState.SUCCEEDED, None), (2, JobState.FAILED, FailureCode.OUT_OF_MEMORY)],
)
def test_out_of_memory_is_tried_once_more(
    worker: Worker, faults: int, state: JobState, code: FailureCode | None
) -> None:
    worker.start(FaultyEngine(worker.checkpoints, [torch.OutOfMemoryError("CUDA out of memory")] * faults))
    job = worker.ended(worker.submit())
    assert (job.state, job.error_code, job.attempts) == (state, code, 1)


class HoardingEngine(FaultyEngine):
    """Runs out of memory twice, each time in a frame that a reference cycle keeps alive."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__(checkpoints, [])
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.freed: list[bool] = []

    def render(self, prompt: PromptSpec, controls: Sequence[Image.Image], observer: Observer) -> Media:
        if len(self.tensors) == 2:
            self.freed = [reference() is None for reference in self.tensors]
            return super().render(prompt, controls, observer)
        activations = torch.ones(8)
        self.tensors.append(weakref.ref(activations))
        error = torch.OutOfMemoryError("CUDA out of memory")
        raise error


def test_a_job_out_of_memory_leaves_nothing_to_the_next(worker: Worker) -> None:
    engine = HoardingEngine(worker.checkpoints)
    gc.disable()  # A garbage collection by chance would hide leaks.
    try:
        worker.start(engine)
        assert worker.ended(worker.submit()).error_code == FailureCode.OUT_OF_MEMORY
        assert worker.ended(worker.submit()).state is JobState.SUCCEEDED
    finally:
        gc.enable()
    assert engine.freed == [True, True]


def test_a_spec_of_another_version_fails_its_job_alone(worker: Worker) -> None:
    worker.start()
    spec = worker.job(worker.submit()).spec
    newer = NewJob(
        id=str(uuid.uuid4()), model="flux", spec={**spec, "output_format": "avif", "new": 1}, adapter="a"
    )
    failed = worker.ended(worker.queue.submit([newer])[0].id)
    assert (failed.state, failed.error_code, failed.attempts) == (
        JobState.FAILED,
        FailureCode.SPEC_UNREADABLE,
        1,
    )
    assert worker.ended(worker.submit()).state is JobState.SUCCEEDED
    known = NewJob(id=str(uuid.uuid4()), model="flux", spec={**spec, "new": 1}, adapter="a")
    assert worker.ended(worker.queue.submit([known])[0].id).state is JobState.SUCCEEDED


_PROCESS = """
import sys, time
from pathlib import Path
from cluster.objects.directory import DirectoryStore
from cluster.jobs.queue import JobQueue
from tests.deployments.worker import test_claiming as t
from deployments.worker.heartbeat import Heartbeat
from deployments.worker.run import STALL_LIMITS_S

class Stuck(t.FaultyEngine):
    def render(self, *args):
        time.sleep(600)

folder, checkpoints, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if kind == "stuck":
    t.Heartbeat = lambda *a, **k: Heartbeat(*a, **k, stall_limits_s=dict.fromkeys(STALL_LIMITS_S, 1.0))
    engine = Stuck(checkpoints, [])
else:
    engine = t.FaultyEngine(checkpoints, [RuntimeError("CUDA error")], poisoned=True)
queue = JobQueue(f"sqlite:///{folder}/jobs.db", lease_s=t.LEASE_S)
t.Worker(queue, DirectoryStore(folder / "outputs"), folder / "loras", checkpoints, owner="sick").start(engine)
time.sleep(120)
"""


@pytest.mark.parametrize(("kind", "status"), [("poisoned", EXIT_POISONED), ("stuck", EXIT_STALLED)])
def test_a_sick_worker_ends_itself_and_another_does_the_job(
    worker: Worker, tmp_path: Path, kind: str, status: int
) -> None:
    job_id = worker.submit()
    arguments = [str(tmp_path), str(worker.checkpoints), kind]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PROCESS), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr[-2000:]
    job = worker.job(job_id)
    assert job.state is (JobState.IN_QUEUE if kind == "poisoned" else JobState.IN_PROGRESS)
    worker.start()

    def swept() -> bool:
        worker.queue.sweep()
        return worker.job(job_id).state.terminal

    wait_until(swept, 60, "the job's end on another worker")
    job = worker.job(job_id)
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 2)


def test_the_next_job_renders_while_one_is_published(worker: Worker, tmp_path: Path) -> None:
    class SlowStore(DirectoryStore):
        def put(self, key: str, data: bytes, content_type: str) -> None:
            time.sleep(1.0)
            super().put(key, data, content_type)

    worker.store = SlowStore(tmp_path / "outputs")
    worker.start()
    first, second = worker.submit(), worker.submit("b")
    worker.ended(first)
    worker.ended(second)
    started: Callable[[str], float] = lambda job_id: worker.job(job_id).started_at or 0.0  # noqa: E731
    assert started(second) < (worker.job(first).finished_at or 0.0)
