"""Idempotency-Key: one job per key, the same answer for the same body, 409 for another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serve_app.conftest import Service, body, serving


def test_the_same_key_and_body_give_the_same_answer(service: Service) -> None:
    first = service.post(body(unknown=1), "same")
    rows = service.stored[0]
    again = service.post(body(unknown=1), "same")
    assert (again.status_code, again.json()) == (200, first.json())
    assert service.stored[0] == rows


def test_layout_nulls_defaults_and_unknown_fields_do_not_make_another_body(service: Service) -> None:
    job_id = service.submit(key="equal")
    for twin in (
        body(prompt={"width": None}, trigger_word=None),
        dict(reversed(body().items())),
        body(other=1),
    ):
        assert service.submit(twin, "equal") == job_id


def test_another_body_is_a_conflict_and_stores_nothing(service: Service) -> None:
    service.submit(key="taken")
    before = service.stored
    for other in (body(prompt={"seed": 1}), body(model="sd15"), body(lora={"path": "missing.safetensors"})):
        answer = service.post(other, "taken")
        assert answer.status_code == 409
        assert answer.json()["detail"]["error"]["code"] == "IDEMPOTENCY_KEY_REUSED"
    assert service.stored == before


def test_a_random_seed_is_drawn_once_for_all_repeats(service: Service) -> None:
    request = body(prompt={"seed": -1})
    assert service.submit(request, "drawn") == service.submit(request, "drawn")


def test_the_answer_holds_when_the_lora_is_gone_and_when_the_gateway_restarted(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        (service.settings.loras / "style.safetensors").rename(service.settings.loras / "other.safetensors")
        assert service.post(body(), "k").status_code == 400
        request = body(lora={"path": "other.safetensors"})
        first = service.post(request, "k")
        assert first.status_code == 200, "a refused request must not take its key"
        (service.settings.loras / "other.safetensors").unlink()
    with serving(tmp_path) as service:
        again = service.post(request, "k")
        assert (again.status_code, again.json()) == (200, first.json())
        assert service.status(first.json()["request_id"])["status"] == "in_queue"


def test_without_a_key_equal_bodies_are_two_jobs(service: Service) -> None:
    assert service.submit() != service.submit()


@pytest.mark.parametrize("bodies", [[body()] * 12, [body(prompt={"seed": seed % 2}) for seed in range(12)]])
def test_concurrent_twins_make_one_job(fresh: Service, bodies: list[dict[str, object]]) -> None:
    def post(request: dict[str, object]) -> httpx.Response:
        headers = {"Idempotency-Key": "twins"}
        return httpx.post(f"{fresh.client.base_url}/v1/inference", json=request, headers=headers, timeout=60)

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(post, bodies))
    assert fresh.stored[0] == 1
    accepted = [index for index, answer in enumerate(answers) if answer.status_code == 200]
    assert len({answers[index].json()["request_id"] for index in accepted}) == 1
    winner = bodies[accepted[0]]
    assert accepted == [index for index, request in enumerate(bodies) if request == winner]
    assert {answer.status_code for answer in answers} <= {200, 409}


@pytest.mark.parametrize("key", ["", "a" * 256, "tab\there", "ümlaut".encode()], ids=repr)
def test_a_bad_key_is_refused(service: Service, key: str | bytes) -> None:
    before = service.stored
    headers = [(b"Idempotency-Key", key.encode() if isinstance(key, str) else key)]
    answer = service.client.post("/v1/inference", json=body(), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["detail"]["error"]["code"] == "IDEMPOTENCY_KEY_INVALID"
    assert service.stored == before


def test_the_longest_key_is_taken(service: Service) -> None:
    assert service.submit(key="~" * 255) == service.submit(key="~" * 255)
