"""`lora-serve submit`, `get`, `cancel` and `models --url` as scripts use them: output and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.jobs.model import JobState
from serve_app.cli import terminal
from serve_app.cli.main import app
from tests.serve_app.conftest import Service, body, rendering, serving
from tests.support.service import free_port


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    port = free_port()
    with serving(tmp_path_factory.mktemp("cli"), port, base_url=f"http://127.0.0.1:{port}") as running:
        yield running


def run(service: Service, *arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [*map(str, arguments), "--url", str(service.client.base_url)])
    assert done.exit_code == code, done.output
    return done


def rows_of(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def request(folder: Path, name: str, **changes: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps(body(prompt={"width": 64, "height": 80}, **changes)))
    return file


def test_submit_and_watch_in_a_process_of_its_own(service: Service, tmp_path: Path) -> None:
    files = [request(tmp_path, "a.json"), request(tmp_path, "b.json"), request(tmp_path, "c.json", model="x")]
    command = [Path(sys.executable).with_name("lora-serve"), "submit", *files, "--watch"]
    environment = os.environ | {"LORA_SERVE_URL": str(service.client.base_url)}
    with rendering(service):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1, done.stderr
    first, second = done.stdout.splitlines()
    job_id, state, file, url = first.split()
    assert (state, file) == ("succeeded", str(files[0])) and service.client.get(url).status_code == 200
    assert str(files[1]) in second
    assert f"{files[2]}: MODEL_NOT_FOUND: " in done.stderr and job_id in done.stderr


def test_a_job_from_submit_to_files(service: Service, tmp_path: Path) -> None:
    (job,) = rows_of(run(service, "submit", request(tmp_path, "a.json"), "--json"))
    assert job["file"] == str(tmp_path / "a.json")
    (waiting,) = rows_of(run(service, "get", job["request_id"], "--json"))
    assert (waiting["status"], waiting["queue_position"]) == ("in_queue", 0)
    assert run(service, "get", job["request_id"]).stdout == f"{job['request_id']}  in_queue, 0 ahead\n"
    service.publish(service.claim(job["request_id"]))
    (made,) = rows_of(run(service, "get", job["request_id"], "--json", "--out", tmp_path / "out"))
    (saved,) = made["saved"]
    assert Path(saved).stat().st_size == made["outputs"]["images"][0]["bytes"]
    assert made["metadata"]["inference_time"] == 1.5 and made["attempts"] == 1


def test_failed_and_canceled_jobs_are_told_by_the_exit_code(service: Service) -> None:
    failed, waiting, running = (service.submit(body(model="sd15")) for _ in range(3))
    claim = service.claim(failed)
    service.queue.finish(claim, JobState.FAILED, error="no such file", error_code="LORA_NOT_FOUND")
    done = run(service, "get", failed, code=1)
    assert done.stdout == f"{failed}  LORA_NOT_FOUND: no such file\n"
    assert run(service, "cancel", waiting).stdout == f"{waiting}  canceled\n"
    service.claim(running)
    done = run(service, "cancel", running, failed, "nothing", "--json", code=1)
    stops, ended, unknown = rows_of(done)
    assert stops["cancel_requested"] and stops["status"] == "in_progress"
    assert ended["refused"]["code"] == "JOB_ALREADY_FINISHED"
    assert unknown == {"request_id": "nothing", "refused": unknown["refused"]}
    (unknown,) = rows_of(run(service, "get", "nothing", "--watch", "--json", code=1))
    assert (unknown["request_id"], unknown["refused"]["code"]) == ("nothing", "REQUEST_NOT_FOUND")


def test_models_of_a_server(service: Service) -> None:
    rows = rows_of(run(service, "models", "--json"))
    assert rows == service.client.get("/v1/models").json()["models"]
    assert run(service, "models").stdout.splitlines()[0].split()[0] == rows[0]["id"]


def test_wrong_usage_and_no_server(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for file in ("a.json", "nothing.json"):
        assert "Invalid value" in run(service, "submit", tmp_path / file, code=2).stderr
    assert "Invalid value" in run(service, "models", "--gpu", "80", code=2).stderr
    done = CliRunner().invoke(app, ["get", "x", "--url", "ftp://host"])
    assert done.exit_code == 2 and "base_url" in done.stderr


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "FIRST_PATIENCE_S", 0.5)
    done = CliRunner().invoke(app, ["get", "x", "--url", f"http://127.0.0.1:{free_port()}"])
    assert done.exit_code == 3 and done.stderr.startswith("x: UNREACHABLE: 127.0.0.1")
