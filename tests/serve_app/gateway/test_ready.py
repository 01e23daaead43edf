"""`/ready` fails if the job table is unreachable; `/health` still succeeds."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from cluster.databases import sqlite
from serve_app.settings import GatewayArgs
from tests.cluster.databases.postgres import PostgresServer
from tests.cluster.jobs.tables import locked
from tests.serve_app.conftest import Service, running
from tests.support.service import wait_until


def assert_lost(client: httpx.Client) -> None:
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["detail"]["error"]["code"] == "STORE_UNAVAILABLE"
    assert int(answer.headers["retry-after"]) >= 1
    assert client.get("/health").status_code == 200


def assert_back(client: httpx.Client) -> None:
    wait_until(lambda: client.get("/ready").status_code == 200, 20, "the return of the job table")
    assert client.get("/ready").json() == {"status": "ready"}


def test_a_locked_file_and_its_release(fresh: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
    before = fresh.stored
    assert_back(fresh.client)
    with locked(fresh.settings.jobs):
        assert_lost(fresh.client)
    assert_back(fresh.client)
    assert fresh.stored == before


def test_a_server_that_stops_and_starts(tmp_path: Path) -> None:
    server = PostgresServer(flush=False)
    try:
        settings = {"jobs": server.create(), "outputs": f"file://{tmp_path}", "loras": tmp_path}
        with running(GatewayArgs.model_validate(settings)) as client:
            assert_back(client)
            server.stop()
            assert_lost(client)
            server.start()
            assert_back(client)
    finally:
        server.close()
