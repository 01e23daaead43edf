"""Prefetching: LoRAs of coming jobs are downloaded during a run, for one job each. Errors go to that job."""

from __future__ import annotations

import errno
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cluster.failures import FailureCode, JobFailure
from cluster.jobs.claims import Answer
from cluster.jobs.model import Job, NewJob
from cluster.jobs.queue import JobQueue
from cluster.net.fetcher import Fetcher
from cluster.net.urls import parse_hosts
from cluster.secrets import seal
from deployments.engine.tiny import write_tiny_lora
from deployments.loras.sources.disk_cache import LoraStore
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.loras import Loras
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec
from deployments.spec.lora_reference import parse
from deployments.worker import prefetch
from deployments.worker.prefetch import SLOTS, Arrival, Prefetcher
from tests.support.service import wait_until
from tests.support.web import Site, answer, serving_site

PROMPT = PromptSpec(prompt="a road", neg="", width=64, height=64, steps=2, guidance=4.0, seed=1)


class Bench:
    """A prefetcher with a real queue and a real web server; records what it prepared."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.site = site
        self.queue = JobQueue(f"sqlite:///{folder}/jobs.db")
        write_tiny_lora(folder / "loras" / "x.safetensors", seed=1)
        self.data = (folder / "loras" / "x.safetensors").read_bytes()
        self.gate = threading.Event()
        self.arrived = threading.Event()
        self.prepared: list[LoraFile] = []
        self.cache = folder / "cache"
        store = LoraStore(self.cache, 2**30)
        fetcher = Fetcher(parse_hosts([site.host]))
        self.loras = Loras(folder / "loras", store, fetcher, max_bytes=2**20)
        self.prefetcher = Prefetcher(
            self.loras,
            self.prepare,
            peek_next=self.peek_next,
            queued=self.queue.queued,
            arrived=self.arrived.set,
        )

    @contextmanager
    def prepare(self, file: LoraFile) -> Iterator[None]:
        self.prepared.append(file)
        yield

    def peek_next(self, coming: frozenset[str]) -> tuple[Job, str | None] | None:
        return self.queue.peek_next("flux", "busy", warm=self.prefetcher.held, patience_s=0, without=coming)

    def job(self, *loras: LoraSpec | str) -> Job:
        named = tuple(LoraSpec(path=parse(lora)) if isinstance(lora, str) else lora for lora in loras)
        spec = RenderSpec(model="flux", loras=named, prompts=(PROMPT,))
        new = NewJob(
            id=str(uuid.uuid4()), model="flux", spec=spec.model_dump(mode="json"), adapter=spec.adapter
        )
        return self.queue.submit([new])[0]

    def offer(self, job: Job, secret: str | None = None, patience_s: float = 60.0) -> Answer:
        return self.prefetcher.offer(job, secret, patience_s=patience_s)

    def brought(self, job: Job) -> Arrival:
        wait_until(lambda: self.offer(job) is Answer.TAKE, 30, "the arrival")
        arrival = self.prefetcher.take(job)
        assert arrival is not None
        return arrival

    def slow(self, path: str) -> str:
        """Return the URL of a file that is sent when the gate opens."""

        def page(request: BaseHTTPRequestHandler) -> None:
            self.gate.wait(30)
            answer(request, 200, self.data)

        self.site.pages[path] = page
        return self.site.url(path)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with serving_site() as site:
        bench = Bench(tmp_path, site)
        yield bench
        bench.gate.set()
        bench.prefetcher.close()
        bench.queue.close()


def opened(arrival: Arrival, lora: LoraSpec) -> LoraFile:
    with arrival.open(lora, tick=lambda: None, token=None) as file:
        return file


def test_what_is_on_the_node_is_taken_at_once(bench: Bench) -> None:
    here = bench.job("x.safetensors")
    assert bench.offer(here) is Answer.TAKE
    assert bench.offer(bench.job()) is Answer.TAKE
    assert bench.offer(bench.job("../x.safetensors")) is Answer.TAKE, "the job itself gets the error"
    assert bench.prefetcher.take(here) is None
    assert bench.prefetcher.held == frozenset()


def test_what_cannot_be_looked_at_is_claimed_to_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.job("x.safetensors")
    assert bench.offer(replace(job, spec={**job.spec, "prompts": 5})) is Answer.TAKE, "another version's spec"

    def sick(_lora: LoraSpec) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(bench.loras, "opens_offline", sick)
    assert bench.offer(job) is Answer.TAKE


def test_what_is_elsewhere_is_brought_first(bench: Bench) -> None:
    lora = LoraSpec(path=parse(bench.slow("/x.safetensors")), transformer="low")
    job = bench.job(lora)
    assert [bench.offer(job) for _ in range(3)] == [Answer.BRING] * 3
    assert bench.prefetcher.held == {job.adapter}
    assert bench.prefetcher.take(job) is None
    assert not bench.arrived.is_set()
    bench.gate.set()
    arrival = bench.brought(job)
    assert bench.arrived.wait(10)
    with arrival.leases:
        assert opened(arrival, lora).path.read_bytes() == bench.data
    assert [file.expert for file in bench.prepared] == ["low"]
    assert bench.site.count("/x.safetensors") == 1
    assert bench.prefetcher.held == frozenset()


def test_one_that_names_a_hash_which_the_node_has_is_taken_at_once(bench: Bench) -> None:
    first = LoraSpec(path=parse(bench.site.file("/x.safetensors", bench.data)))
    job = bench.job(first)
    bench.offer(job)
    sha256 = opened(bench.brought(job), first).sha256
    elsewhere = bench.site.url("/gone.safetensors")
    assert bench.offer(bench.job(LoraSpec(path=parse(elsewhere), sha256=sha256))) is Answer.TAKE
    assert bench.offer(bench.job(first)) is Answer.BRING, "another job needs its own credentials"


def test_a_failure_is_kept_for_its_job(bench: Bench) -> None:
    lora = LoraSpec(path=parse(bench.site.url("/nowhere.safetensors")))
    job = bench.job(lora)
    bench.offer(job)
    arrival = bench.brought(job)
    with pytest.raises(JobFailure) as caught:
        opened(arrival, lora)
    assert caught.value.code is FailureCode.LORA_NOT_FOUND
    assert bench.site.count("/nowhere.safetensors") == 1


def test_a_fault_of_our_own_costs_an_attempt_and_tells_no_secret(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SECRET_KEY", "a phrase of more than thirty-two characters")

    def prepare(_file: LoraFile) -> None:
        raise RuntimeError("in the middle of hf_5ecret5ecret5ecret")

    monkeypatch.setattr(bench.prefetcher, "_prepare", prepare)
    lora = LoraSpec(path=parse(bench.site.file("/x.safetensors", bench.data)))
    job, secret = bench.job(lora), seal({"queries": ["?signature=5ecret"], "hf_token": "hf_5ecret5ecret"})
    with caplog.at_level(logging.DEBUG):
        bench.offer(job, secret)
        arrival = bench.brought(job)
    with pytest.raises(JobFailure) as caught:
        opened(arrival, LoraSpec(path=lora.path.with_query("?signature=5ecret")))
    assert (caught.value.code, caught.value.retry) == (FailureCode.INTERNAL_ERROR, True)
    assert "5ecret" not in caplog.text
    assert any(path.endswith("?signature=5ecret") for _, path, _ in bench.site.requests)


def test_what_ended_a_process_is_brought_but_not_prepared_ahead_of_its_job(bench: Bench) -> None:
    lora = LoraSpec(path=parse(bench.site.file("/x.safetensors", bench.data)))
    first, second = bench.job(lora), bench.job(lora)
    bench.offer(first)
    sha256 = opened(bench.brought(first), lora).sha256
    assert [file.sha256 for file in bench.prepared] == [sha256]
    (bench.cache / "suspects" / f"{sha256}.of-a-dead-process").touch()
    bench.offer(second)
    with (arrival := bench.brought(second)).leases:
        assert opened(arrival, lora).sha256 == sha256
    assert len(bench.prepared) == 1


def test_an_idle_replica_brings_one_at_a_time_until_that_takes_long(bench: Bench) -> None:
    jobs = [bench.job(bench.slow(f"/{n}.safetensors")) for n in range(SLOTS + 2)]
    assert [bench.offer(job) for job in jobs[:3]] == [Answer.BRING, Answer.LEAVE, Answer.LEAVE]
    answers = [bench.offer(job, patience_s=0.0) for job in jobs]
    assert answers == [Answer.BRING] * SLOTS + [Answer.LEAVE] * 2
    bench.gate.set()
    wait_until(lambda: bench.offer(jobs[0]) is Answer.TAKE, 30, "an arrival")


def test_what_nobody_takes_makes_room_and_grows_old(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.gate.set()
    jobs = [bench.job(bench.slow(f"/{n}.safetensors")) for n in range(SLOTS + 1)]
    for job in jobs:
        bench.offer(job)
        wait_until(lambda job=job: bench.offer(job) is Answer.TAKE, 30, "the arrival")
    assert bench.prefetcher.held == {job.adapter for job in jobs[1:]}
    monkeypatch.setattr(prefetch, "FRESH_S", 0.0)
    assert bench.offer(jobs[-1]) is Answer.BRING, "the origin is asked again"


def test_the_next_job_s_lora_comes_while_one_renders(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LOOK_S", 0.05)
    slow, local = bench.job(bench.slow("/slow.safetensors")), bench.job("x.safetensors")
    bench.prefetcher.start()
    assert not bench.arrived.wait(0.5), "nothing runs, so downloads are left to the claims"
    assert bench.prefetcher.held == frozenset()
    bench.prefetcher.rendering.set()
    assert bench.arrived.wait(30), "a slow download does not block others"
    assert bench.brought(local).files
    assert bench.offer(slow) is Answer.BRING
    bench.gate.set()
    assert bench.brought(slow).failure is None
    assert all(bench.queue.ahead(job) is not None for job in (slow, local)), "nothing was claimed"


def test_what_another_replica_took_is_dropped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LOOK_S", 0.05)
    bench.gate.set()
    job = bench.job(bench.slow("/x.safetensors"))
    bench.offer(job)
    assert bench.arrived.wait(30)
    bench.prefetcher.start()
    time.sleep(0.2)
    assert bench.prefetcher.held == {job.adapter}
    assert bench.queue.claim("flux", "another") is not None
    wait_until(lambda: not bench.prefetcher.held, 30, "the end of its lease")


def test_closing_ends_what_is_on_its_way(bench: Bench) -> None:
    job = bench.job(bench.slow("/x.safetensors"))
    bench.offer(job)
    wait_until(lambda: bench.site.count("/x.safetensors"), 10, "the request")
    bench.prefetcher.close()
    assert bench.prefetcher.held == frozenset()
    bench.gate.set()
    assert bench.arrived.wait(30)
    assert list((bench.cache / "files").iterdir()) == []
    assert bench.offer(job) is Answer.LEAVE
