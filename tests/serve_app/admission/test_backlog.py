"""Limits on waiting jobs, in total and per key, and requests that they never refuse."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.jobs.queue import JobQueue
from serve_app.admission import backlog
from serve_app.admission.backlog import COUNT_S
from tests.cluster.jobs.tables import new_job
from tests.serve_app.conftest import Service, body, kontext_body, serving

ALICE = {"Authorization": "Bearer alices-key"}
BOB = {"Authorization": "Bearer bobs-key"}


@contextmanager
def limited(folder: Path, in_all: int, per_key: int, *, keys: bool = True) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        if keys:
            patch.setenv("API_KEYS", "alice:alices-key,bob:bobs-key")
        with serving(folder, max_queued=in_all, max_queued_per_key=per_key) as service:
            if keys:
                service.client.headers.update(ALICE)
            yield service


def assert_full(service: Service, answer: httpx.Response, bound: str, most: int) -> None:
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["detail"]["error"]
    assert (error["code"], error["details"]) == ("TOO_MANY_QUEUED", {"bound": bound, "most": most})


def test_a_key_has_its_own_bound(tmp_path: Path) -> None:
    with limited(tmp_path, in_all=100, per_key=2) as service:
        first, _ = service.submit(), service.submit()
        before = service.stored
        assert_full(service, service.post(body()), "max_queued_per_key", 2)
        assert_full(service, service.post(kontext_body()), "max_queued_per_key", 2)
        assert service.stored == before, "not even the control image may be stored"
        bobs = service.client.post("/v1/inference", json=body(), headers=BOB)
        assert bobs.status_code == 200
        # A running job no longer counts as waiting.
        service.claim(first)
        assert service.post(body()).status_code == 200
        assert_full(service, service.post(body()), "max_queued_per_key", 2)


def test_all_keys_share_a_bound(tmp_path: Path) -> None:
    with limited(tmp_path, in_all=2, per_key=2) as service:
        job_id = service.submit()
        assert service.client.post("/v1/inference", json=body(), headers=BOB).status_code == 200
        for headers in (ALICE, BOB):
            answer = service.client.post("/v1/inference", json=body(), headers=headers)
            assert_full(service, answer, "max_queued", 2)
        assert service.client.delete(f"/v1/requests/{job_id}").status_code == 200
        assert service.post(body()).status_code == 200


def test_an_open_service_has_only_the_bound_of_all(tmp_path: Path) -> None:
    with limited(tmp_path, in_all=3, per_key=1, keys=False) as service:
        for _ in range(3):
            service.submit()
        assert_full(service, service.post(body()), "max_queued", 3)


def test_a_repeat_of_a_stored_request_is_never_refused(tmp_path: Path) -> None:
    with limited(tmp_path, in_all=1, per_key=1) as service:
        job_id = service.submit(key="first")
        assert_full(service, service.post(body(), "second"), "max_queued", 1)
        assert service.submit(key="first") == job_id
        assert service.post(body(model="sd15"), "first").status_code == 409
        service.claim(job_id)
        assert service.submit(key="second") != job_id, "a refused request must not take its key"


def test_concurrent_repeats_of_the_last_request_that_fits_are_not_refused(tmp_path: Path) -> None:
    with limited(tmp_path, in_all=1, per_key=1) as service:

        def post(_: int) -> httpx.Response:
            headers = ALICE | {"Idempotency-Key": "twin"}
            url = f"{service.client.base_url}/v1/inference"
            return httpx.post(url, json=body(), headers=headers, timeout=60)

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(post, range(12)))
        assert {answer.status_code for answer in answers} == {200}
        assert service.stored[0] == 1


@pytest.mark.parametrize("bad", [{"model": "nope"}, {"loras": []}])
def test_a_full_service_looks_at_nothing_else(tmp_path: Path, bad: dict[str, Any]) -> None:
    with limited(tmp_path, in_all=1, per_key=1) as service:
        service.submit()
        assert_full(service, service.post(body(**bad)), "max_queued", 1)


def test_prompts_of_a_request_are_bounded_by_a_setting(tmp_path: Path) -> None:
    with serving(tmp_path, max_prompts=2) as service:
        assert service.post(body(prompts=[{"prompt": "a"}] * 2)).status_code == 200
        error = service.post(body(prompts=[{"prompt": "a"}] * 3)).json()["detail"]["error"]
        assert (error["code"], error["details"]) == ("TOO_MANY_PROMPTS", {"prompts": 3, "most": 2})


def test_a_bound_counts_what_came_past_this_gateway_after_a_second(tmp_path: Path) -> None:
    with limited(tmp_path, in_all=100, per_key=2) as service:
        service.submit()
        service.queue.submit([new_job(tenant="alice")])
        time.sleep(COUNT_S)
        assert_full(service, service.post(body()), "max_queued_per_key", 2)


def test_a_queue_is_not_counted_for_every_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    really = JobQueue.waiting

    def waiting(queue: JobQueue, tenant: str) -> tuple[int, int]:
        counted.append(tenant)
        return really(queue, tenant)

    monkeypatch.setattr(JobQueue, "waiting", waiting)
    monkeypatch.setattr(backlog, "COUNT_S", 60.0)
    with limited(tmp_path, in_all=100, per_key=10) as service:
        for _ in range(10):
            service.submit()
        assert counted == ["alice"]
        assert_full(service, service.post(body()), "max_queued_per_key", 10)
        assert counted == ["alice", "alice"], "a refusal must count again first"
