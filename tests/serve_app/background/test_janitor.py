"""The janitor removes old jobs and their outputs in a crash-safe order and keeps everything else."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from cluster.jobs.model import JobState
from serve_app.background import janitor
from tests.serve_app.conftest import Service, body, kontext_body, serving
from tests.support.service import wait_until

SMALL = {"width": 64, "height": 64}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "EXPIRE_S", 0.05)


def let_days_pass(service: Service, days: float) -> None:
    """Make all jobs older. Leases do not change, so running jobs keep running."""
    connection = sqlite3.connect(service.settings.jobs.removeprefix("sqlite:///"))
    with connection:
        for column in ("created_at", "started_at", "finished_at"):
            connection.execute(f"UPDATE jobs SET {column} = {column} - ?", (days * 86_400,))
    connection.close()


def expire_lease(service: Service, job_id: str) -> None:
    connection = sqlite3.connect(service.settings.jobs.removeprefix("sqlite:///"))
    with connection:
        connection.execute("UPDATE jobs SET lease_until = 0 WHERE id = ?", (job_id,))
    connection.close()


def rows(service: Service, table: str) -> int:
    connection = sqlite3.connect(service.settings.jobs.removeprefix("sqlite:///"))
    (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    connection.close()
    return count


def code(service: Service, path: str) -> int:
    return service.client.get(path).status_code


def await_gone(service: Service, job_id: str) -> None:
    wait_until(lambda: code(service, f"/v1/requests/{job_id}/status") == 404, 20, "the removal")


def finished(service: Service, key: str | None = None) -> str:
    job_id = service.submit(body(prompt=SMALL), key)
    service.publish(service.claim(job_id))
    return job_id


def folder_of(service: Service, job_id: str) -> Path:
    return service.settings.loras.parent / "outputs" / job_id


def test_old_jobs_go_with_their_outputs_and_nothing_else_does(tmp_path: Path) -> None:
    with serving(tmp_path, retention_days=2) as service:
        old = finished(service, key="once")
        (image,) = service.result(old)["outputs"]["images"]
        url = image["url"].removeprefix("http://127.0.0.1:8000")
        failed = service.submit()
        service.queue.finish(service.claim(failed), JobState.FAILED, error="e", error_code="OUT_OF_MEMORY")
        canceled = service.submit()
        service.client.delete(f"/v1/requests/{canceled}")
        edit = service.submit(kontext_body())
        running = service.claim(service.submit(body(model="sd15"))).job.id
        let_days_pass(service, 1.5)
        recent = finished(service)
        assert code(service, url) == 200
        let_days_pass(service, 1)
        for job_id in (old, failed, canceled):
            await_gone(service, job_id)
        assert code(service, url) == 404
        assert not folder_of(service, old).exists()
        assert [service.status(each)["status"] for each in (edit, running, recent)] == [
            "in_queue",
            "in_progress",
            "succeeded",
        ]
        assert folder_of(service, recent).is_dir()
        job = service.queue.get(edit)
        assert job and service.store.exists(job.spec["prompts"][0]["controls"][0]), "inputs stay"
        listed = service.client.get("/v1/requests").json()["requests"]
        assert [request["request_id"] for request in listed] == [recent, running, edit]
        assert (rows(service, "jobs"), rows(service, "job_outputs")) == (3, 1)
        # Its idempotency key is free again.
        assert service.submit(body(prompt=SMALL), "once") != old


def test_by_default_a_job_stays_for_a_month(fresh: Service) -> None:
    job_id = finished(fresh)
    let_days_pass(fresh, 29.9)
    short = finished(fresh)
    let_days_pass(fresh, 0.2)
    await_gone(fresh, job_id)
    assert fresh.status(short)["status"] == "succeeded"


def test_zero_keeps_everything(tmp_path: Path) -> None:
    with serving(tmp_path, retention_days=0) as service:
        job_id = finished(service)
        let_days_pass(service, 10_000)
    # A janitor with a limit removes the job, so it was old enough.
    with serving(tmp_path, retention_days=9_000) as service:
        await_gone(service, job_id)


def test_more_than_one_batch_goes_in_one_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "EXPIRE_S", 1.0)
    monkeypatch.setattr(janitor, "BATCH", 2)
    with serving(tmp_path, retention_days=1) as service:
        ids = [finished(service) for _ in range(5)]
        let_days_pass(service, 2)
        wait_until(lambda: rows(service, "jobs") == 0, 3, "one round")
        assert not any(folder_of(service, job_id).exists() for job_id in ids)


def test_while_outputs_cannot_be_removed_their_rows_stay(tmp_path: Path) -> None:
    with serving(tmp_path, retention_days=1) as service:
        job_id = finished(service)
        outputs = tmp_path / "outputs"
        outputs.rename(tmp_path / "aside")
        outputs.write_text("a file where the directory should be")
        let_days_pass(service, 2)
        # Wait for a sweep and many rounds of removals.
        lost = service.submit()
        service.claim(lost)
        expire_lease(service, lost)
        wait_until(lambda: service.status(lost)["status"] == "in_queue", 20, "the sweep")
        assert service.status(job_id)["status"] == "succeeded"
        outputs.unlink()
        (tmp_path / "aside").rename(outputs)
        await_gone(service, job_id)
        assert not folder_of(service, job_id).exists()


def test_a_crash_between_objects_and_row_is_made_good(tmp_path: Path) -> None:
    with serving(tmp_path, retention_days=0) as service:
        job_id = finished(service)
        let_days_pass(service, 2)
        shutil.rmtree(folder_of(service, job_id))
    with serving(tmp_path, retention_days=1) as service:
        await_gone(service, job_id)
