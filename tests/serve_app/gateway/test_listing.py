"""GET /v1/requests: newest first, own jobs only, and pages that stay stable while jobs arrive."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from cluster.jobs.model import JobState, Phase, Progress
from tests.serve_app.conftest import Service, body, serving

BOB = {"Authorization": "Bearer bobs-key"}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """A gateway whose client, Alice, has one job in each state, and Bob one; ids by name, oldest first."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("API_KEYS", "alice:alices-key,bob:bobs-key")
            service = stack.enter_context(serving(tmp_path_factory.mktemp("listed")))
        service.client.headers.update({"Authorization": "Bearer alices-key"})
        ids = {"failed": service.submit()}
        failed = service.claim(ids["failed"])
        service.queue.finish(failed, JobState.FAILED, error="It broke.", error_code="OUT_OF_MEMORY")
        bobs = service.client.post("/v1/inference", json=body(model="sdxl"), headers=BOB).json()
        ids["bob"] = bobs["request_id"]
        ids["succeeded"] = service.submit(body(model="sd15", prompt={"width": 64, "height": 64}))
        service.publish(service.claim(ids["succeeded"]))
        ids["canceled"] = service.submit()
        service.client.delete(f"/v1/requests/{ids['canceled']}")
        ids["running"] = service.submit()
        running = service.claim(ids["running"])
        progress = Progress(prompt=0, prompts=1, step=3, steps=25, phase=Phase.STEP)
        service.queue.heartbeat(running, progress, renew=True)
        ids["queued"] = service.submit(body(model="sd15"))
        yield service, ids


def page(service: Service, **query: Any) -> dict[str, Any]:
    answer = service.client.get("/v1/requests", params=query).raise_for_status().json()
    assert set(answer) == {"requests", "next_cursor"}
    return answer


def ids_of(answer: dict[str, Any]) -> list[str]:
    return [request["request_id"] for request in answer["requests"]]


def test_it_lists_ones_own_jobs_newest_first_as_their_status(
    listed: tuple[Service, dict[str, str]],
) -> None:
    service, ids = listed
    answer = page(service)
    assert answer["next_cursor"] is None
    assert ids_of(answer) == [ids[name] for name in ("queued", "running", "canceled", "succeeded", "failed")]
    for request in answer["requests"]:
        status = service.status(request["request_id"])
        model = "sd15" if request["request_id"] in (ids["queued"], ids["succeeded"]) else "flux"
        assert request == status | {"queue_position": None, "model": model, "batch_id": None}
    bobs = service.client.get("/v1/requests", headers=BOB).json()
    assert ids_of(bobs) == [ids["bob"]]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({"state": "in_queue"}, ["queued"]),
        ({"state": "in_progress"}, ["running"]),
        ({"state": "succeeded"}, ["succeeded"]),
        ({"state": "failed"}, ["failed"]),
        ({"state": "canceled"}, ["canceled"]),
        ({"model": "sd15"}, ["queued", "succeeded"]),
        ({"model": "sd15", "state": "in_queue"}, ["queued"]),
        ({"model": "sdxl"}, []),
        ({"model": "zimage", "state": "failed"}, []),
        ({"limit": "2"}, ["queued", "running"]),
        ({"limit": "1", "state": "failed"}, ["failed"]),
    ],
)
def test_filters(listed: tuple[Service, dict[str, str]], query: dict[str, str], names: list[str]) -> None:
    service, ids = listed
    assert ids_of(page(service, **query)) == [ids[name] for name in names]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"state": "queued"}, 422, None),
        ({"state": ""}, 422, None),
        ({"limit": "0"}, 422, None),
        ({"limit": "201"}, 422, None),
        ({"limit": "many"}, 422, None),
        ({"model": "flux9"}, 400, "MODEL_NOT_FOUND"),
        ({"model": ""}, 400, "MODEL_NOT_FOUND"),
        ({"model": "flux\x00"}, 400, "MODEL_NOT_FOUND"),
        *(
            ({"cursor": cursor}, 400, "CURSOR_INVALID")
            for cursor in (
                "",
                "1",
                "AAAAAAAAAA",
                "AAAAAAAAAAAA",
                "AAAAAAAAAAA",
                "AAAAAAAAAA=",
                " AAAAAAAAAAE",
                "ÄÄÄÄÄÄÄÄÄÄÄ",
                "\x00",
                "__________8",  # 2 ** 64 - 1: no database counts that far.
                "A" * 5000,
            )
        ),
    ],
)
def test_what_is_no_query(
    listed: tuple[Service, dict[str, str]], query: dict[str, str], status: int, code: str | None
) -> None:
    answer = listed[0].client.get("/v1/requests", params=query)
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert (detail["error"]["code"] if code else None) == code


def test_a_cursor_is_opaque_text_for_urls(listed: tuple[Service, dict[str, str]]) -> None:
    cursor = page(listed[0], limit=1)["next_cursor"]
    assert len(base64.urlsafe_b64decode(f"{cursor}=")) == 8


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_pages_meet_while_jobs_arrive_and_end(fresh: Service, limit: int) -> None:
    ids = [fresh.submit(body(model=("flux", "sd15")[index % 2])) for index in range(7)]
    seen, cursor = [], None
    while True:
        answer = page(fresh, limit=limit, **({"cursor": cursor} if cursor else {}))
        assert len(answer["requests"]) <= limit
        seen += ids_of(answer)
        cursor = answer["next_cursor"]
        if cursor is None:
            break
        fresh.submit()
        fresh.client.delete(f"/v1/requests/{seen[-1]}")
    assert seen == ids[::-1]
    of_a_model = page(fresh, model="sd15", limit=2)
    rest = page(fresh, model="sd15", limit=2, cursor=of_a_model["next_cursor"])
    assert ids_of(of_a_model) + ids_of(rest) == ids[5::-2]


def test_the_last_full_page_has_no_next(fresh: Service) -> None:
    for _ in range(2):
        fresh.submit()
    assert page(fresh, limit=2)["next_cursor"] is None
    assert page(fresh, limit=1)["next_cursor"] is not None


def test_it_reads_no_specs(fresh: Service) -> None:
    job_id = fresh.submit()
    connection = sqlite3.connect(fresh.settings.jobs.removeprefix("sqlite:///"))
    with connection:
        connection.execute("UPDATE jobs SET spec = 'no JSON'")
    connection.close()
    assert ids_of(page(fresh)) == [job_id]


def test_anothers_cursor_shows_only_ones_own(listed: tuple[Service, dict[str, str]]) -> None:
    service, ids = listed
    cursor = page(service, limit=1)["next_cursor"]
    bobs = service.client.get("/v1/requests", params={"cursor": cursor}, headers=BOB).json()
    assert ids_of(bobs) == [ids["bob"]]
