"""`lora-serve batch` on a real gateway; the test acts as the worker."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.jobs.model import JobState
from serve_app.cli.main import app
from tests.serve_app.conftest import Service, rendering


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,width,height\na red fox,64,64\na lighthouse,64,64\n")
    return file


def call(service: Service, *arguments: object) -> Result:
    environment = {"LORA_SERVE_URL": str(service.client.base_url)}
    return CliRunner().invoke(app, ["batch", *map(str, arguments)], env=environment)


def grid(table: Path) -> list[object]:
    return ["submit", table, "--model", "flux", "--lora", "style.safetensors", "--seed", 1, "--seed", 2]


def test_a_table_is_submitted_watched_and_submitted_again(fresh: Service, table: Path) -> None:
    with rendering(fresh):
        done = call(fresh, *grid(table), "--watch", "--json")
    assert done.exit_code == 0, done.output
    status = json.loads(done.stdout)
    assert status["counts"]["succeeded"] == status["total"] == 4
    assert f"batch {status['batch_id']}" in done.stderr and "rendered: 100%" in done.stderr
    again = call(fresh, *grid(table), "--id", status["batch_id"])
    assert (again.exit_code, again.stdout.split()) == (0, [status["batch_id"], "4", "succeeded"])


def test_get_cancel_and_retry(fresh: Service, table: Path) -> None:
    batch_id = json.loads(call(fresh, *grid(table), "--json").stdout)["batch_id"]
    claim = fresh.queue.claim("flux", "worker-1")
    assert claim is not None
    fresh.queue.finish(claim, JobState.FAILED, error="It broke.", error_code="OUT_OF_MEMORY")
    assert call(fresh, "get", batch_id).stdout.split("  ")[1:] == ["3 in_queue", "1 failed\n"]
    assert json.loads(call(fresh, "retry", batch_id, "--json").stdout)["counts"]["in_queue"] == 4
    assert call(fresh, "cancel", batch_id).stdout.endswith("  4 canceled\n")
    watched = call(fresh, "get", batch_id, "--watch")
    assert watched.exit_code == 1, "not all succeeded"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["get", str(uuid.uuid4())], 1, "BATCH_NOT_FOUND"),
        (["get", "mine"], 2, "badly formed"),
        (["submit", "missing.csv"], 2, "No such file"),
        (["submit", __file__], 2, "a .csv or a .jsonl"),
        (["get", str(uuid.uuid4()), "--url", "http://"], 2, "base_url"),
    ],
)
def test_exit_codes(service: Service, arguments: list[str], code: int, said: str) -> None:
    done = call(service, *arguments)
    assert done.exit_code == code
    assert said in done.stderr


def test_a_refused_row_is_named(service: Service, table: Path) -> None:
    table.write_text("prompt,lora\na,style.safetensors\nb,missing.safetensors\n")
    done = call(service, "submit", table, "--model", "flux")
    assert done.exit_code == 1
    assert "BATCH_REFUSED" in done.stderr and "request 1: LORA_NOT_FOUND" in done.stderr
