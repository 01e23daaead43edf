"""A request's hf_token: the worker gets it, nothing else shows it, and it is deleted when the job ends."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.failures import FailureCode, JobFailure
from cluster.jobs.model import JobState
from cluster.secrets import open_secret
from deployments.spec.job import RenderSpec, join_secrets
from tests.serve_app.conftest import Service, body, serving

TOKEN = "hf_Sg7secretSg7secretSg7"

KEY = "an operator's own phrase of 40 characters"


@pytest.fixture
def sealing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The test's own gateway with a SECRET_KEY, which its worker here shares."""
    monkeypatch.setenv("SECRET_KEY", KEY)
    with serving(tmp_path) as service:
        yield service


def secrets_of(service: Service) -> list[str | None]:
    """Return the column as stored on disk, oldest job first."""
    connection = sqlite3.connect(service.settings.jobs.removeprefix("sqlite:///"))
    rows = connection.execute("SELECT secret FROM jobs ORDER BY seq").fetchall()
    connection.close()
    return [secret for (secret,) in rows]


def test_the_worker_gets_it_and_nobody_else_does(sealing: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    submitted = sealing.post(body(hf_token=TOKEN), "once")
    job_id = submitted.json()["request_id"]
    answers = [submitted, sealing.post(body(hf_token=TOKEN), "once"), sealing.post(body(), "once")]
    assert [answer.status_code for answer in answers] == [200, 200, 409]
    for path in ("", f"/{job_id}/status", f"/{job_id}/result"):
        answers.append(sealing.client.get(f"/v1/requests{path}"))
    claim = sealing.claim(job_id)
    assert claim.secret is not None
    assert open_secret(claim.secret) == {"hf_token": TOKEN}
    assert not any(claim.secret in answer.text for answer in answers)
    texts = [repr(claim), caplog.text, *(answer.text for answer in answers)]
    files = [file for file in sealing.settings.loras.parent.rglob("*") if file.is_file()]
    assert any(claim.secret.encode() in file.read_bytes() for file in files), "sealed, it is there"
    for clear in (TOKEN, KEY):
        assert not any(clear in text for text in texts)
        assert not any(clear.encode() in file.read_bytes() for file in files)


def test_the_query_of_a_url_is_as_secret_as_a_token(sealing: Service) -> None:
    query = "?X-Amz-Signature=5ecret5ecret5ecret"
    url = "https://files.example/style.safetensors"
    claim = sealing.claim(sealing.submit(body(lora={"path": f"{url}{query}"})))
    assert claim.job.spec["loras"][0]["path"] == url
    assert claim.secret is not None
    whole = join_secrets(RenderSpec.model_validate(claim.job.spec), open_secret(claim.secret)["queries"])
    assert whole.loras[0].path.text == f"{url}{query}"
    files = [file for file in sealing.settings.loras.parent.rglob("*") if file.is_file()]
    assert not any(b"5ecret5ecret" in file.read_bytes() for file in files)


def _cancel_queued(service: Service, job_id: str) -> None:
    assert service.client.delete(f"/v1/requests/{job_id}").status_code == 200


def _succeed(service: Service, job_id: str) -> None:
    service.publish(service.claim(job_id))


def _fail(service: Service, job_id: str) -> None:
    service.queue.finish(service.claim(job_id), JobState.FAILED, error="no", error_code="OUT_OF_MEMORY")


def _cancel_running(service: Service, job_id: str) -> None:
    service.queue.finish(service.claim(job_id), JobState.CANCELED)


@pytest.mark.parametrize("end", [_cancel_queued, _cancel_running, _succeed, _fail])
def test_it_is_erased_when_the_job_has_ended(sealing: Service, end: Callable[[Service, str], None]) -> None:
    job_id = sealing.submit(body(hf_token=TOKEN, prompt={"width": 64, "height": 64}))
    assert secrets_of(sealing) != [None]
    end(sealing, job_id)
    assert secrets_of(sealing) == [None]


def test_it_lasts_for_another_attempt(sealing: Service) -> None:
    job_id = sealing.submit(body(hf_token=TOKEN))
    sealing.queue.retry(sealing.claim(job_id), error="e", error_code="DEVICE_FAULT", delay_s=0)
    again = sealing.claim(job_id)
    assert again.secret is not None and open_secret(again.secret) == {"hf_token": TOKEN}


def test_a_worker_with_another_key_tells_nothing(sealing: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = sealing.claim(sealing.submit(body(hf_token=TOKEN)))
    assert claim.secret is not None
    monkeypatch.setenv("SECRET_KEY", "rotated " * 5)
    with pytest.raises(JobFailure) as raised:
        open_secret(claim.secret)
    failure = raised.value
    sealing.queue.finish(claim, JobState.FAILED, error=failure.message, error_code=failure.code)
    status = sealing.status(claim.job.id)
    assert status["error_code"] == FailureCode.SECRET_UNREADABLE
    assert TOKEN not in status["error"] and claim.secret not in status["error"]


def test_without_a_token_nothing_is_sealed(sealing: Service) -> None:
    for request in (body(), body(hf_token=None), body(hf_token="")):
        sealing.submit(request)
    assert secrets_of(sealing) == [None] * 3


REFUSED: dict[str, dict[str, Any]] = {
    "unknown model": body(model="nope", hf_token=TOKEN),
    "no such LoRA": body(lora={"path": "missing.safetensors"}, hf_token=TOKEN),
    "too long": body(hf_token=TOKEN * 50),
    "a line end": body(hf_token=f"{TOKEN}\r\nX-Header: 1"),
    "a blank": body(hf_token=f"{TOKEN} "),
    "not ASCII": body(hf_token=f"{TOKEN}ü"),
    "a list": body(hf_token=[TOKEN]),
}


@pytest.mark.parametrize("request_body", REFUSED.values(), ids=REFUSED)
def test_no_refusal_repeats_it(
    sealing: Service, caplog: pytest.LogCaptureFixture, request_body: dict[str, Any]
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = sealing.post(request_body)
    assert answer.status_code in (400, 422)
    assert TOKEN not in answer.text + caplog.text
    assert sealing.stored[0] == 0


def test_a_store_that_fails_does_not_tell_it(sealing: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    connection = sqlite3.connect(sealing.settings.jobs.removeprefix("sqlite:///"))
    with connection:
        connection.execute("ALTER TABLE jobs RENAME COLUMN secret TO hidden")
    connection.close()
    answer = sealing.post(body(hf_token=TOKEN))
    assert answer.status_code in (500, 503)
    assert "hidden" in caplog.text or "secret" in caplog.text, "the fault is logged"
    assert TOKEN not in answer.text + caplog.text
