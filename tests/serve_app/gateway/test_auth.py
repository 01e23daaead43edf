"""API keys: access, ownership of jobs, and that no key ever appears in a message."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.jobs.model import JobState
from serve_app.gateway.app import create_app
from serve_app.gateway.auth import ApiKeys, open_keys
from serve_app.settings import GatewayArgs
from tests.serve_app.conftest import Service, body, serving

ALICE, ALICES_NEXT, NAMELESS = "Sg7alice-0123456789", "Sg7alice-next/+==", "Sg7nameless-0123456"

KEYS = f"alice:{ALICE}, alice:{ALICES_NEXT},{NAMELESS}"

NO_ID = str(uuid.UUID(int=0))

ROUTES = [
    ("POST", "/v1/inference"),
    ("GET", "/v1/requests"),
    ("GET", "/v1/requests/{id}/status"),
    ("GET", "/v1/requests/{id}/status?wait=5"),
    ("GET", "/v1/requests/{id}/result"),
    ("GET", "/v1/requests/{id}/events"),
    ("DELETE", "/v1/requests/{id}"),
    ("GET", "/v1/models"),
]

OF_A_JOB = [route for route in ROUTES if "{id}" in route[1]]

NO_KEYS: dict[str, dict[str, str]] = {
    "no header": {},
    "empty": {"Authorization": ""},
    "no key": {"Authorization": "Bearer"},
    "no scheme": {"Authorization": ALICE},
    "other scheme": {"Authorization": f"Basic {ALICE}"},
    "wrong": {"Authorization": "Bearer Sg7wrong-0123456789"},
    "prefix": {"Authorization": f"Bearer {ALICE[:-1]}"},
    "longer": {"Authorization": f"Bearer {ALICE}0"},
    "other case": {"Authorization": f"Bearer {ALICE.upper()}"},
    "its name": {"Authorization": "Bearer alice"},
    "the entry": {"Authorization": f"Bearer alice:{ALICE}"},
    "another header": {"X-Api-Key": ALICE},
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway with keys whose client is Alice."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("API_KEYS", KEYS)
            service = stack.enter_context(serving(tmp_path_factory.mktemp("keyed")))
        service.client.headers.update(bearer(ALICE))
        yield service


@pytest.fixture
def stranger(keyed: Service) -> Iterator[httpx.Client]:
    """A client of the same gateway without a key."""
    with httpx.Client(base_url=keyed.client.base_url, timeout=30) as client:
        yield client


@pytest.mark.parametrize("headers", NO_KEYS.values(), ids=NO_KEYS)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(
    keyed: Service, stranger: httpx.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    before = keyed.stored
    content = body() if method == "POST" else None
    answer = stranger.request(method, path.format(id=NO_ID), json=content, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["detail"]["error"]
    assert (error["code"], error["details"]) == ("API_KEY_REQUIRED", {})
    assert "Sg7" not in answer.text
    assert keyed.stored == before


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"model": 1}', b"[" * 300_000], ids=lambda c: c[:9])
def test_a_body_is_not_looked_at_without_a_key(
    keyed: Service, stranger: httpx.Client, content: bytes
) -> None:
    assert stranger.post("/v1/inference", content=content).status_code == 401
    with_key = stranger.post("/v1/inference", content=content, headers=bearer(ALICE))
    assert with_key.status_code in (413, 422)


def test_what_needs_no_key(keyed: Service, stranger: httpx.Client) -> None:
    claim = keyed.claim(keyed.submit(body(prompt={"width": 64, "height": 64})))
    keyed.publish(claim)
    (image,) = keyed.result(claim.job.id)["outputs"]["images"]
    output = image["url"].removeprefix("http://127.0.0.1:8000")
    for path in ("/health", "/ready", "/docs", "/redoc", "/openapi.json", output):
        assert stranger.get(path).status_code == 200, path


def test_every_key_is_let_in_and_the_scheme_has_no_case(keyed: Service, stranger: httpx.Client) -> None:
    for key in (ALICE, ALICES_NEXT, NAMELESS):
        for scheme in ("Bearer", "bearer", "BEARER"):
            answer = stranger.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
            assert answer.status_code == 200


@pytest.mark.parametrize(("method", "path"), OF_A_JOB)
@pytest.mark.parametrize("running", [False, True])
def test_anothers_job_looks_like_none(
    keyed: Service, stranger: httpx.Client, method: str, path: str, running: bool
) -> None:
    job_id = keyed.submit()
    claim = keyed.claim(job_id) if running else None
    stranger.headers.update(bearer(NAMELESS))
    seen, unknown = (stranger.request(method, path.format(id=each)) for each in (job_id, NO_ID))
    assert seen.status_code == unknown.status_code == 404
    assert seen.text.replace(job_id, NO_ID) == unknown.text
    assert set(seen.headers) == set(unknown.headers)
    assert keyed.status(job_id)["cancel_requested"] is False
    if claim is None:
        assert keyed.client.delete(f"/v1/requests/{job_id}").status_code == 200
    else:
        keyed.queue.finish(claim, JobState.CANCELED)


def test_keys_of_one_name_share_their_jobs(keyed: Service, stranger: httpx.Client) -> None:
    job_id = keyed.submit()
    stranger.headers.update(bearer(ALICES_NEXT))
    assert stranger.get(f"/v1/requests/{job_id}/status").json() == keyed.status(job_id)
    assert stranger.delete(f"/v1/requests/{job_id}").status_code == 200


def test_an_idempotency_key_belongs_to_its_owner(keyed: Service, stranger: httpx.Client) -> None:
    alices = keyed.submit(key="same")
    headers = {"Idempotency-Key": "same"}
    own = stranger.post("/v1/inference", json=body(), headers=headers | bearer(NAMELESS))
    assert own.status_code == 200 and own.json()["request_id"] != alices
    next_key = stranger.post("/v1/inference", json=body(), headers=headers | bearer(ALICES_NEXT))
    assert next_key.json()["request_id"] == alices
    other_body = stranger.post("/v1/inference", json=body(model="sd15"), headers=headers | bearer(NAMELESS))
    assert other_body.status_code == 409


def test_no_key_is_in_table_or_log(keyed: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keyed.submit(key="traces")
    keyed.client.get("/v1/requests", headers=bearer("Sg7wrong-0123456789"))
    assert "Sg7" not in caplog.text
    files = list(keyed.settings.loras.parent.glob("jobs.db*"))
    assert files
    assert not any(b"Sg7" in file.read_bytes() for file in files)


def test_the_description_names_the_scheme_only_where_there_are_keys(keyed: Service) -> None:
    description = keyed.client.get("/openapi.json").json()
    assert description["components"]["securitySchemes"] == {"API key": {"type": "http", "scheme": "bearer"}}
    for path, methods in description["paths"].items():
        for operation in methods.values():
            keyed_route = path.startswith("/v1/")
            assert (operation.get("security") == [{"API key": []}]) is keyed_route, path
            assert ("401" in operation["responses"]) is keyed_route, path
    open_description = create_app(GatewayArgs()).openapi()
    assert "securitySchemes" not in open_description["components"]
    assert "API_KEY" not in str(open_description)


def test_an_open_service_says_so_and_ignores_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as service:
        assert [record.levelname for record in caplog.records if "is open" in record.message] == ["WARNING"]
        job_id = service.submit()
        assert service.client.get("/v1/models", headers=bearer("anything")).status_code == 200
    caplog.clear()
    monkeypatch.setenv("API_KEYS", KEYS)
    with serving(tmp_path) as service:
        assert "is open" not in caplog.text
        answer = service.client.get(f"/v1/requests/{job_id}/status", headers=bearer(ALICE))
        assert answer.status_code == 404, "jobs from before the keys have no owner"


def test_keys_are_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", KEYS)
    monkeypatch.setenv("SECRET_KEY", "Sg7" * 20)
    settings = GatewayArgs()
    assert "Sg7" not in f"{settings!r} {settings.model_dump()}"
    keys = open_keys()
    assert keys is not None
    assert "Sg7" not in f"{keys!r} {keys} {vars(keys)}"


# --- Keys from the environment and the file ---


def test_a_nameless_key_is_named_by_a_part_of_its_hash() -> None:
    keys = ApiKeys("b:2", None), ApiKeys(" 1 ,,b:2,", None)
    assert [each.tenant_of("2") for each in keys] == ["b", "b"]
    assert [each.tenant_of("1") for each in keys] == [None, "6b86b273ff34fce1"]


@pytest.mark.parametrize(
    "listed",
    [" ", ",", "a b", "a:b:Sg7", ":Sg7", "a:", "ä:Sg7", "a:Sg7ü", "a/b:Sg7", "x\x01Sg7", f"{'a' * 65}:Sg7"],
)
def test_what_is_no_list_of_keys_is_refused_without_being_told(listed: str) -> None:
    with pytest.raises(ValueError, match="API_KEYS") as raised:
        ApiKeys(listed, None)
    assert "Sg7" not in str(raised.value)


def test_a_key_has_one_owner() -> None:
    assert ApiKeys("a:k,a:k", None).tenant_of("k") == "a"
    for listed in ("a:k,b:k", "a:k,k"):
        with pytest.raises(ValueError, match="entry 2 has another name"):
            ApiKeys(listed, None)


def test_a_bad_environment_ends_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad: list[tuple[str, str, type[Exception]]] = [
        ("API_KEYS", ",", ValueError),
        ("API_KEYS_FILE", str(tmp_path / "missing"), OSError),
        ("SECRET_KEY", "too short", ValueError),
    ]
    for name, value, error in bad:
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setenv(name, value)
            create_app(GatewayArgs())


@pytest.mark.parametrize(("name", "value"), [("API_KEYS", ""), ("API_KEYS_FILE", "")])
def test_an_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert open_keys() is None


def test_a_file_and_the_list_add_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys of the team\nbob:in-file\n\n  spaced  \n")
    monkeypatch.setenv("API_KEYS_FILE", str(file))
    monkeypatch.setenv("API_KEYS", "alice:listed")
    keys = open_keys()
    assert keys is not None
    assert [keys.tenant_of(key) for key in ("in-file", "listed", "# keys of the team")] == [
        "bob",
        "alice",
        None,
    ]
    assert keys.tenant_of("spaced")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text("a:b:Sg7c"),
        lambda file: file.write_bytes(b"\xff"),
    ],
    ids=["gone", "no keys", "no text"],
)
def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], Any]
) -> None:
    file = tmp_path / "keys"
    file.write_text("a:first")
    keys = ApiKeys("", file)
    file.write_text("a:first\nb:second")
    assert [keys.tenant_of(key) for key in ("first", "second")] == ["a", "b"]
    file.write_text("b:second")
    assert [keys.tenant_of(key) for key in ("first", "second")] == [None, "b"]
    spoil(file)
    for _ in range(3):
        assert keys.tenant_of("second") == "b"
    assert len(caplog.records) == 1, "one warning in all"
    assert "Sg7" not in caplog.text
    file.write_text("c:third")
    assert [keys.tenant_of(key) for key in ("second", "third")] == [None, "c"]
