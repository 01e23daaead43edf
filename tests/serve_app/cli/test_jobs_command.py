"""`lora-serve jobs` on a real table and store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.jobs.model import JobState
from cluster.jobs.queue import JobQueue
from cluster.objects.directory import DirectoryStore
from serve_app.cli.main import app
from tests.cluster.jobs.tables import claim, new_job, submit


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobQueue]:
    monkeypatch.setenv("JOBS_URL", f"sqlite:///{tmp_path}/jobs.db")
    monkeypatch.setenv("OUTPUT_BASE_PATH", f"file://{tmp_path}/outputs")
    queue = JobQueue(f"sqlite:///{tmp_path}/jobs.db")
    yield queue
    queue.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["jobs", *arguments])


def failed(queue: JobQueue) -> str:
    (job,) = submit(queue, "a")
    queue.finish(claim(queue), JobState.FAILED, error="no file", error_code="LORA_NOT_FOUND")
    return job.id


def test_list_tells_the_jobs_of_all_keys_newest_first(queue: JobQueue) -> None:
    broken = failed(queue)
    (other,) = queue.submit([new_job(tenant="alice", model="sd15")])
    lines = run("list").output.splitlines()
    assert [line.split()[:4] for line in lines] == [
        [other.id, "in_queue", "0", "sd15"],
        [broken, "failed", "1", "flux"],
    ]
    assert lines[0].endswith("alice") and lines[1].endswith("-  LORA_NOT_FOUND")
    assert run("list", "--state", "failed", "--limit", "1").output == lines[1] + "\n"
    assert run("list", "--model", "sd15").output == lines[0] + "\n"


def test_show_tells_everything_but_secrets(queue: JobQueue) -> None:
    (job,) = queue.submit([new_job(secret="ciphertext")])
    held = claim(queue)
    queue.record_output(held, 0, {"key": "a.png"})
    queue.finish(held, JobState.SUCCEEDED, result={"warnings": []})
    result = run("show", job.id)
    shown = json.loads(result.output)
    assert (shown["id"], shown["state"], shown["outputs"]) == (job.id, "succeeded", [{"key": "a.png"}])
    assert [event["state"] for event in shown["events"]] == ["in_queue", "in_progress", "succeeded"]
    assert "ciphertext" not in result.output


def test_cancel(queue: JobQueue) -> None:
    ended = failed(queue)
    running, waiting = submit(queue, "a", "b")
    assert claim(queue).job.id == running.id
    result = run("cancel", waiting.id, running.id, ended, "nothing")
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        f"{waiting.id}  canceled",
        f"{running.id}  stopping",
        f"{ended}  it has already ended: failed",
        "nothing  no such job",
    ]


def test_a_failed_job_is_queued_again_as_another(queue: JobQueue) -> None:
    broken = failed(queue)
    (waiting,) = submit(queue, "b")
    result = run("requeue", broken, waiting.id)
    assert result.exit_code == 1
    assert f"{waiting.id}  only failed jobs can be requeued, this one is in_queue" in result.output
    again = queue.get(result.output.split("queued again as ")[1].split()[0])
    before = queue.get(broken)
    assert again is not None and before is not None
    assert (again.state, again.spec, again.adapter) == (JobState.IN_QUEUE, before.spec, before.adapter)
    assert before.state is JobState.FAILED


def test_purge_removes_what_has_ended_with_its_objects(queue: JobQueue, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "outputs")
    broken = failed(queue)
    (waiting,) = submit(queue, "b")
    for job_id in (broken, waiting.id):
        store.put(f"{job_id}/1/0.png", b"x", "image/png")
    assert run("purge", "--older-than-days", "1").output == "0 jobs removed\n"
    assert run("purge", "--older-than-days", "0").output == "1 jobs removed\n"
    assert (queue.get(broken), queue.get(waiting.id)) == (None, waiting)
    assert not store.exists(f"{broken}/1/0.png") and store.exists(f"{waiting.id}/1/0.png")


def test_a_table_that_cannot_be_reached_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs.db").mkdir()
    monkeypatch.setenv("JOBS_URL", f"sqlite:///{tmp_path}/jobs.db")
    result = run("list")
    assert result.exit_code == 1 and result.output.startswith("the job table cannot be reached")
    assert result.output.count("\n") == 1
