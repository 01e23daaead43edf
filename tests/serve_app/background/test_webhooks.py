"""Webhooks from a real gateway to a real receiver."""

from __future__ import annotations

import base64
import json
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook
from typer.testing import CliRunner

from cluster.jobs import webhook_outbox as outbox
from serve_app.background import webhook_sender as webhooks
from serve_app.cli.main import app
from serve_app.gateway.app import create_app
from serve_app.settings import GatewayArgs
from tests.serve_app.conftest import Service, body, serving
from tests.support.service import wait_until
from tests.support.web import Site, answer, serving_site

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()

SMALL = {"width": 64, "height": 64}


@pytest.fixture
def site() -> Iterator[Site]:
    with serving_site() as site:
        yield site


@pytest.fixture
def service(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(webhooks, "LOOK_S", 0.05)
    with serving(tmp_path, fetch_hosts=(site.host,)) as running:
        yield running


def hooked(site: Site, path: str = "/hook", **hook: Any) -> dict[str, Any]:
    return body(prompt=SMALL, webhook={"url": site.url(path), **hook})


def code(service: Service, request: dict[str, Any]) -> tuple[int, str]:
    refusal = service.post(request)
    return refusal.status_code, refusal.json()["detail"]["error"]["code"]


def test_the_end_of_a_job_is_told_once_and_signed(service: Service, site: Site) -> None:
    site.pages["/hook"] = lambda request: answer(request, 204)
    job_id = service.submit(hooked(site))
    assert not site.posted
    service.publish(service.claim(job_id))
    wait_until(lambda: site.posted, 20, "the message")
    ((_, _, headers),) = site.requests
    message = Webhook(SECRET).verify(site.posted[0], dict(headers))
    assert message["type"] == "request.succeeded"
    assert message["data"].items() >= service.status(job_id).items()
    assert message["timestamp"] == message["data"]["finished_at"]
    assert headers["webhook-id"] == f"{job_id}.{message['data']['sequence']}"
    assert service.queue.outbox.take(1) == []


def test_a_receiver_that_fails_is_told_again_and_redelivery_begins_anew(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "DELAYS_S", (0.0, 0.0))
    moved: list[BaseHTTPRequestHandler] = []
    site.pages["/hook"] = lambda request: answer(request, 500)
    site.pages["/elsewhere"] = moved.append
    job_id = service.submit(hooked(site, events=["canceled"]))
    service.client.delete(f"/v1/requests/{job_id}")
    wait_until(lambda: len(site.posted) == 3, 20, "all attempts")
    site.pages["/hook"] = lambda request: answer(request, 302, Location="/elsewhere")
    monkeypatch.setenv("JOBS_URL", service.settings.jobs)
    assert CliRunner().invoke(app, ["jobs", "redeliver", job_id]).exit_code == 0
    wait_until(lambda: len(site.posted) == 6, 20, "all attempts, again")
    assert not moved, "a redirect is a failed delivery and must not be followed"
    site.pages["/hook"] = lambda request: answer(request, 200)
    assert CliRunner().invoke(app, ["jobs", "redeliver", job_id]).exit_code == 0
    wait_until(lambda: len(site.posted) == 7, 20, "the receipt")
    assert len({headers["webhook-id"] for _, _, headers in site.requests}) == 1


def test_a_query_reaches_the_receiver_and_is_stored_nowhere_in_clear(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    request = hooked(site, "/hook?token=t0psecret")
    assert code(service, request) == (400, "SECRET_KEY_REQUIRED")
    monkeypatch.setenv("SECRET_KEY", "s" * 32)
    site.pages["/hook"] = lambda page: answer(page, 500)
    job_id = service.submit(request)
    service.client.delete(f"/v1/requests/{job_id}")
    wait_until(lambda: site.posted, 20, "the message")
    assert site.requests[0][1] == "/hook?token=t0psecret"
    wait_until(lambda: "500" in (stored_error(service) or ""), 20, "the error")
    for file in tmp_path.glob("jobs.db*"):
        assert b"t0psecret" not in file.read_bytes()
    assert b"t0psecret" not in site.posted[0]


def stored_error(service: Service) -> str | None:
    connection = sqlite3.connect(service.settings.jobs.removeprefix("sqlite:///"))
    (error,) = connection.execute("SELECT error FROM webhooks").fetchone()
    connection.close()
    return error


def test_bad_webhooks_are_refused_and_nothing_is_stored(service: Service, site: Site) -> None:
    before = service.stored
    for url in (
        "http://127.0.0.1/",
        "http://169.254.169.254/",
        "ftp://example.org/",
        "https://u:p@example.org/",
    ):
        assert code(service, body(webhook={"url": url})) == (400, "URL_NOT_ALLOWED")
    for hook in (
        {},
        {"url": None},
        {"url": site.url("/"), "events": []},
        {"url": "x", "events": ["in_queue"]},
    ):
        assert service.post(body(webhook=hook)).status_code == 422
    assert service.stored == before


def test_unknown_fields_of_a_webhook_are_named(service: Service, site: Site) -> None:
    warnings = service.post(hooked(site, retries=3)).json()["warnings"]
    assert "'webhook.retries'" in json.dumps(warnings)


def test_without_a_secret_there_are_no_webhooks(fresh: Service, site: Site) -> None:
    assert code(fresh, hooked(site)) == (400, "WEBHOOK_SECRET_REQUIRED")


@pytest.mark.parametrize("secret", ["geheim", "whsec_", "whsec_AAAA", "whsec_" + "%" * 40])
def test_a_bad_secret_is_told_at_the_start(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", secret)
    with pytest.raises(ValueError, match="24 to 64 random bytes"):
        create_app(GatewayArgs())


def test_a_slow_receiver_holds_up_nobody_beside_it(service: Service, site: Site) -> None:
    gate = threading.Event()
    site.pages["/slow"] = lambda request: gate.wait(30) and answer(request, 204)
    site.pages["/hook"] = lambda request: answer(request, 204)
    try:
        for path in ("/slow", *["/hook"] * (2 * webhooks.SENDERS)):
            service.client.delete(f"/v1/requests/{service.submit(hooked(site, path))}")
        wait_until(lambda: site.count("/hook") == 2 * webhooks.SENDERS, 20, "the messages to the others")
        assert site.count("/slow") == 1 and not gate.is_set()
    finally:
        gate.set()
