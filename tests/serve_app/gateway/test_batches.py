"""Routes under /v1/batches: all or nothing, once per key, own batches only, within the queue's limits."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.jobs.model import JobState
from tests.serve_app.conftest import Service, base64_png, body, kontext_body, serving

NO_ID = str(uuid.UUID(int=0))

ALICE, BOB = ({"Authorization": f"Bearer {name}s-key"} for name in ("alice", "bob"))


def seeded(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [body(prompt={"seed": first + index, "width": 64, "height": 64}) for index in range(count)]


def post(service: Service, requests: list[Any], key: str | None = None, **fields: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return service.client.post("/v1/batches", json={"requests": requests, **fields}, headers=headers)


def stored(service: Service, requests: list[Any], key: str | None = None, **fields: Any) -> dict[str, Any]:
    answer = post(service, requests, key, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def read(service: Service, batch_id: str, tail: str = "", **query: Any) -> dict[str, Any]:
    return service.client.get(f"/v1/batches/{batch_id}{tail}", params=query).raise_for_status().json()


def counts(service: Service, batch_id: str) -> dict[str, int]:
    return {state: count for state, count in read(service, batch_id)["counts"].items() if count}


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    error = answer.json()["detail"]["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    return error["details"]


def fail(service: Service, job_id: str) -> None:
    failed = service.claim(job_id)
    service.queue.finish(failed, JobState.FAILED, error="It broke.", error_code="OUT_OF_MEMORY")


def test_a_batch_from_submission_to_results(fresh: Service) -> None:
    first = stored(fresh, [*seeded(2), body(other=1)])
    batch_id, ids = first["batch_id"], first["request_ids"]
    assert first["batch_url"].endswith(f"/v1/batches/{batch_id}")
    assert first["warnings"] == ["requests[2]: Unknown fields were ignored: 'other'."]
    more = stored(fresh, seeded(1, 7), batch_id=batch_id)
    assert more["batch_id"] == batch_id
    ids += more["request_ids"]
    fresh.publish(fresh.claim(ids[0]))
    fail(fresh, ids[1])
    fresh.claim(ids[2])
    status = read(fresh, batch_id)
    assert status["total"] == 4
    assert status["counts"] == {"in_queue": 1, "in_progress": 1, "succeeded": 1, "failed": 1, "canceled": 0}
    results = read(fresh, batch_id, "/results")
    assert [result["request_id"] for result in results["results"]] == ids
    done, failed, running, queued = results["results"]
    single = fresh.result(ids[0])
    assert done == done | single
    assert (done["prompts"][0]["seed"], done["prompts"][0]["prompt"]) == (0, "a red fox")
    path = {"path": "style.safetensors", "network_multiplier": 1.0, "transformer": None}
    assert done["loras"] == [path]
    assert done["started_at"] is not None and done["attempts"] == 1
    assert (failed["error"], failed["error_code"]) == ("It broke.", "OUT_OF_MEMORY")
    assert [result["status"] for result in (running, queued)] == ["in_progress", "in_queue"]
    listed = fresh.client.get("/v1/requests", params={"batch": batch_id}).json()["requests"]
    assert [request["request_id"] for request in listed] == ids[::-1]
    assert {request["batch_id"] for request in listed} == {batch_id}
    assert fresh.client.get("/v1/requests", params={"batch": str(uuid.uuid4())}).json()["requests"] == []


@pytest.mark.parametrize("limit", [1, 2, 4, 5])
def test_pages_of_results_meet(fresh: Service, limit: int) -> None:
    batch = stored(fresh, seeded(4))
    seen, cursor = [], None
    while True:
        query = {"limit": limit, **({"cursor": cursor} if cursor else {})}
        page = read(fresh, batch["batch_id"], "/results", **query)
        seen += [result["request_id"] for result in page["results"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == batch["request_ids"]


def test_one_bad_request_refuses_all_and_each_is_named(fresh: Service) -> None:
    good = kontext_body()
    before = fresh.stored
    bad = [body(model="flux9"), body(lora={"path": "missing.safetensors"}), kontext_body(ctrl_img="!")]
    details = refused(post(fresh, [good, *bad, good], "k"), 400, "BATCH_REFUSED")
    errors = [(error["index"], error["code"]) for error in details["errors"]]
    assert errors == [(1, "MODEL_NOT_FOUND"), (2, "LORA_NOT_FOUND"), (3, "CONTROL_IMAGE_INVALID")]
    assert details["refused"] == 3
    assert "flux" in details["errors"][0]["details"]["supported_models"]
    assert fresh.stored == before, "neither rows nor control images of the valid requests may be stored"
    assert stored(fresh, [good], "k")["request_ids"], "a refused batch does not take its key"


def test_many_errors_are_counted_and_some_are_told(service: Service) -> None:
    details = refused(post(service, [body(model="flux9")] * 50), 400, "BATCH_REFUSED")
    assert details["refused"] == 50
    assert [error["index"] for error in details["errors"]] == list(range(20))


@pytest.mark.parametrize(
    "sent",
    [
        {"requests": []},
        {"requests": [body()] * 1001},
        {"requests": [body(), {"model": "flux"}]},
        {"requests": [body()], "batch_id": "mine"},
        {"requests": [body()], "batch_id": f"{uuid.uuid4()}\n"},
        {"requests": [body()], "batch": str(uuid.uuid4())},
        {},
    ],
    ids=lambda sent: str(sorted(sent))[:40],
)
def test_what_is_no_batch(service: Service, sent: dict[str, Any]) -> None:
    before = service.stored
    answer = service.client.post("/v1/batches", json=sent)
    assert answer.status_code == 422
    if len(sent.get("requests", ())) == 2:
        assert answer.json()["detail"][0]["loc"][:3] == ["body", "requests", 1]
    assert service.stored == before


@pytest.mark.parametrize("named", [True, False])
def test_a_call_with_a_key_is_stored_once(fresh: Service, named: bool) -> None:
    fields = {"batch_id": str(uuid.uuid4())} if named else {}
    first = stored(fresh, seeded(3), "chunk", **fields)
    fail(fresh, first["request_ids"][0])
    fresh.client.post(f"/v1/batches/{first['batch_id']}/retry").raise_for_status()
    (fresh.settings.loras / "style.safetensors").unlink()
    rows = fresh.stored[0]
    assert stored(fresh, seeded(3), "chunk", **fields) == first
    for other in (seeded(2), seeded(4), seeded(3, 1)):
        refused(post(fresh, other, "chunk", **fields), 409, "IDEMPOTENCY_KEY_REUSED")
    refused(post(fresh, seeded(3), "chunk", batch_id=str(uuid.uuid4())), 409, "IDEMPOTENCY_KEY_REUSED")
    refused(post(fresh, seeded(3), "", **fields), 400, "IDEMPOTENCY_KEY_INVALID")
    assert fresh.stored[0] == rows


def test_requests_beside_a_batch_do_not_share_its_keys(fresh: Service) -> None:
    stored(fresh, seeded(1), "k")
    fresh.submit(key="k")
    fresh.submit(key="k0")
    assert fresh.stored[0] == 3


def test_cancel_ends_what_has_not_ended(fresh: Service) -> None:
    batch = stored(fresh, seeded(4))
    url = f"/v1/batches/{batch['batch_id']}"
    fresh.publish(fresh.claim(batch["request_ids"][0]))
    running = fresh.claim(batch["request_ids"][1])
    answer = fresh.client.delete(url)
    assert answer.status_code == 202
    assert counts(fresh, batch["batch_id"]) == {"succeeded": 1, "in_progress": 1, "canceled": 2}
    assert fresh.status(batch["request_ids"][1])["cancel_requested"]
    fresh.queue.release(running)
    again = fresh.client.delete(url)
    assert (again.status_code, again.json()["counts"]["canceled"]) == (200, 3)


def test_retry_submits_only_what_failed(fresh: Service) -> None:
    batch = stored(fresh, seeded(4))
    batch_id, ids = batch["batch_id"], batch["request_ids"]
    for job_id in ids[:2]:
        fail(fresh, job_id)
    fresh.publish(fresh.claim(ids[2]))
    url = f"/v1/batches/{batch_id}/retry"
    assert fresh.client.post(url, params={"limit": 1}).json()["retried"] == 1
    answer = fresh.client.post(url).json()
    assert (answer["retried"], answer["counts"]["in_queue"], answer["total"]) == (1, 3, 4)
    assert fresh.client.post(url).json()["retried"] == 0
    results = read(fresh, batch_id, "/results")["results"]
    assert [result["prompts"][0]["seed"] for result in results] == [2, 3, 0, 1]
    assert not set(ids[:2]) & {result["request_id"] for result in results}
    assert fresh.status(ids[0])["status"] == "failed"
    assert fresh.client.post(url, params={"limit": 0}).status_code == 422


@pytest.mark.parametrize("batch_id", ["mine", NO_ID, f"{NO_ID}\n", "\x00"])
def test_an_unknown_batch(service: Service, batch_id: str) -> None:
    url = f"/v1/batches/{batch_id}".replace("\n", "%0A").replace("\x00", "%00")
    for method, tail in (("GET", ""), ("GET", "/results"), ("POST", "/retry"), ("DELETE", "")):
        refused(service.client.request(method, url + tail), 404, "BATCH_NOT_FOUND")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("API_KEYS", "alice:alices-key,bob:bobs-key")
            folder = tmp_path_factory.mktemp("keyed")
            service = stack.enter_context(serving(folder, max_queued=6, max_queued_per_key=4))
        yield service


def test_a_batch_belongs_to_its_key_and_fits_into_the_queue_or_not_at_all(keyed: Service) -> None:
    assert post(keyed, seeded(1)).status_code == 401
    keyed.client.headers.update(ALICE)
    mine = stored(keyed, seeded(3), "k")
    url = f"/v1/batches/{mine['batch_id']}"
    for method, tail in (("GET", ""), ("GET", "/results"), ("POST", "/retry"), ("DELETE", "")):
        refused(keyed.client.request(method, url + tail, headers=BOB), 404, "BATCH_NOT_FOUND")
    details = refused(post(keyed, seeded(2)), 429, "TOO_MANY_QUEUED")
    assert details == {"bound": "max_queued_per_key", "most": 4}
    assert counts(keyed, mine["batch_id"]) == {"in_queue": 3}
    assert stored(keyed, seeded(3), "k") == mine, "a repeated submit must succeed even if the queue is full"
    refused(post(keyed, seeded(5)), 413, "BATCH_TOO_LARGE")
    keyed.client.headers.update(BOB)
    # The same batch id and idempotency key, but from Bob.
    stored(keyed, seeded(3), "k", batch_id=mine["batch_id"])
    assert read(keyed, mine["batch_id"])["total"] == 3
    assert refused(post(keyed, seeded(1)), 429, "TOO_MANY_QUEUED")["bound"] == "max_queued"
    keyed.client.delete(url).raise_for_status()
    keyed.client.headers.update(ALICE)
    assert counts(keyed, mine["batch_id"]) == {"in_queue": 3}


def test_a_retry_waits_for_room(keyed: Service) -> None:
    keyed.client.headers.update(BOB)
    batch = stored(keyed, [body(model="sd15")] * 2)
    for job_id in batch["request_ids"]:
        fail(keyed, job_id)
    stored(keyed, [body(model="sdxl")] * 3)
    url = f"/v1/batches/{batch['batch_id']}/retry"
    refused(keyed.client.post(url), 429, "TOO_MANY_QUEUED")
    assert counts(keyed, batch["batch_id"]) == {"failed": 2}


def test_a_picture_of_many_requests_is_stored_once(fresh: Service, tmp_path: Path) -> None:
    picture = base64_png(40, 40)
    stored(fresh, [kontext_body(ctrl_img=picture, seed=seed) for seed in range(5)])
    inputs = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert len(inputs) == 1


def test_a_thousand_requests_are_one_call(fresh: Service) -> None:
    batch = stored(fresh, seeded(1000))
    assert len(set(batch["request_ids"])) == 1000
    assert counts(fresh, batch["batch_id"]) == {"in_queue": 1000}
    fresh.client.delete(f"/v1/batches/{batch['batch_id']}").raise_for_status()
    assert counts(fresh, batch["batch_id"]) == {"canceled": 1000}
