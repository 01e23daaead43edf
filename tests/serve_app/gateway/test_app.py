"""The routes: the shape of every answer, a job from submit to result, and faults of the stores."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.jobs.model import JobState, Phase, Progress
from cluster.jobs.queue import JobQueue
from deployments.catalog import CATALOG
from tests.serve_app.conftest import Service, body, kontext_body, serving
from tests.support.service import wait_until

NO_ID = str(uuid.UUID(int=0))


def assert_time(text: str) -> datetime:
    assert text.endswith("Z")
    moment = datetime.fromisoformat(text)
    assert abs(moment.timestamp() - datetime.now().timestamp()) < 600
    return moment


def error_of(answer: Any) -> tuple[int, str, dict[str, Any]]:
    error = answer.json()["detail"]["error"]
    return answer.status_code, error["code"], error["details"]


def test_submit_answers_as_the_reference(service: Service) -> None:
    answer = service.post(body())
    assert answer.status_code == 200
    data = answer.json()
    job_id = data["request_id"]
    assert str(uuid.UUID(job_id, version=4)) == job_id
    assert_time(data.pop("created_at"))
    assert data == {
        "request_id": job_id,
        "status": "queued",
        "status_url": f"http://127.0.0.1:8000/v1/requests/{job_id}/status",
        "result_url": f"http://127.0.0.1:8000/v1/requests/{job_id}/result",
        "warnings": [],
    }


def test_a_job_from_queue_to_pictures(fresh: Service) -> None:
    job_id = fresh.submit(
        body(prompts=[{"prompt": "a", "width": 64, "height": 80}, {"prompt": "b", "seed": 7}], unknown=1)
    )
    created = fresh.status(job_id)["created_at"]
    warning = "Unknown fields were ignored: 'unknown'."
    assert fresh.status(job_id) == {
        "request_id": job_id,
        "status": "in_queue",
        "created_at": created,
        "started_at": None,
        "finished_at": None,
        "error": None,
        "error_code": None,
        "progress": None,
        "queue_position": 0,
        "attempts": 0,
        "cancel_requested": False,
    }
    waiting = {
        "request_id": job_id,
        "status": "in_queue",
        "outputs": None,
        "error": None,
        "created_at": created,
        "finished_at": None,
        "metadata": {"model": "flux", "inference_time": None, "timings": None, "warnings": [warning]},
    }
    assert fresh.result(job_id) == waiting

    claim = fresh.claim(job_id)
    progress = Progress(prompt=1, prompts=2, step=3, steps=25, phase=Phase.STEP)
    fresh.queue.heartbeat(claim, progress, renew=True)
    running = fresh.status(job_id)
    assert_time(running["started_at"])
    assert running["status"] == "in_progress"
    assert running["progress"] == {"prompt": 1, "prompts": 2, "step": 3, "steps": 25, "phase": "step"}
    assert (running["queue_position"], running["attempts"]) == (None, 1)
    assert fresh.result(job_id) == waiting | {"status": "in_progress"}

    fresh.publish(claim)
    ended = fresh.status(job_id)
    assert ended["status"] == "succeeded"
    assert assert_time(ended["finished_at"]) >= assert_time(ended["started_at"]) >= assert_time(created)
    result = fresh.result(job_id)
    assert result["status"] == "succeeded"
    assert result["finished_at"] == ended["finished_at"]
    assert result["metadata"] == {
        "model": "flux",
        "inference_time": 1.5,
        "timings": {"render": 1.25},
        "warnings": [warning, "2 of 4 modules matched."],
    }
    assert result["outputs"]["videos"] == []
    first, second = result["outputs"]["images"]
    picture = Path(first["file_path"]).read_bytes()
    assert first == {
        "format": "png",
        "width": 64,
        "height": 80,
        "file_path": str(fresh.settings.loras.parent / "outputs" / job_id / "1" / "0.png"),
        "seed": 42,
        "url": f"http://127.0.0.1:8000/outputs/{job_id}/1/0.png",
        "sha256": hashlib.sha256(picture).hexdigest(),
        "bytes": len(picture),
        "manifest_url": f"http://127.0.0.1:8000/outputs/{job_id}/1/0.json",
    }
    assert second["seed"] == 7


def test_a_video_tells_its_frames(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit(body(model="wan21_1b")))
    output = {
        "kind": "video",
        "format": "webp",
        "width": 64,
        "height": 80,
        "num_frames": 5,
        "fps": 16,
        "seed": 42,
        "key": f"{claim.job.id}/1/0.webp",
        "manifest_key": f"{claim.job.id}/1/0.json",
        "sha256": "0" * 64,
        "bytes": 7,
    }
    fresh.store.put(output["key"], b"a video", "image/webp")
    fresh.queue.record_output(claim, 0, output)
    fresh.queue.finish(claim, JobState.SUCCEEDED, result={})
    outputs = fresh.result(claim.job.id)["outputs"]
    (video,) = outputs["videos"]
    assert outputs["images"] == []
    file_path = str(fresh.settings.loras.parent / "outputs" / output["key"])
    urls = {
        "url": f"http://127.0.0.1:8000/outputs/{output['key']}",
        "manifest_url": f"http://127.0.0.1:8000/outputs/{output['manifest_key']}",
    }
    fields = {name: value for name, value in output.items() if not name.endswith(("kind", "key"))}
    assert video == {**fields, "file_path": file_path, **urls}
    assert fresh.client.get(f"/outputs/{output['key']}").headers["content-type"] == "image/webp"


def test_video_models_say_so(service: Service) -> None:
    rows = {row["id"]: row for row in service.client.get("/v1/models").json()["models"]}
    row = rows["wan21_1b"]
    assert (row["is_video_model"], row["default_num_frames"], row["default_fps"]) == (True, 41, 16)
    assert row["output_formats"] == ["webp", "mp4"]


def test_recorded_outputs_stay_hidden_until_the_job_succeeded(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit())
    fresh.queue.record_output(claim, 0, {"kind": "image"})
    assert fresh.result(claim.job.id)["outputs"] is None
    fresh.queue.finish(claim, JobState.FAILED, error="It broke.", error_code="OUT_OF_MEMORY")
    result, status = fresh.result(claim.job.id), fresh.status(claim.job.id)
    assert (result["status"], result["outputs"], result["error"]) == ("failed", None, "It broke.")
    assert (status["error"], status["error_code"]) == ("It broke.", "OUT_OF_MEMORY")
    assert_time(result["finished_at"])


def test_the_queue_position_counts_the_jobs_ahead_of_the_same_model(fresh: Service) -> None:
    ids = [fresh.submit(), fresh.submit(body(model="sd15")), fresh.submit(), fresh.submit()]
    assert [fresh.status(job_id)["queue_position"] for job_id in ids] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "request_id", [NO_ID, "1", "%00", "..%2f..", "a" * 2000, NO_ID.replace("0", "G"), "%F0%9F%A6%8A"]
)
def test_an_unknown_id_is_a_404(service: Service, request_id: str) -> None:
    for method, suffix in (("GET", "/status"), ("GET", "/result"), ("GET", "/status?wait=5"), ("DELETE", "")):
        answer = service.client.request(method, f"/v1/requests/{request_id}{suffix}")
        assert answer.status_code == 404
        if "%2f" not in request_id:
            assert error_of(answer)[1] == "REQUEST_NOT_FOUND"


def test_a_long_poll_has_bounds(service: Service) -> None:
    job_id = service.submit()
    for wait in ("61", "-1", "nan", "inf", "soon", ""):
        answer = service.client.get(f"/v1/requests/{job_id}/status", params={"wait": wait})
        assert answer.status_code == 422, wait
    assert service.status(job_id, wait="0.2")["status"] == "in_queue"


def test_a_queued_job_is_canceled_at_once(service: Service) -> None:
    job_id = service.submit()
    answer = service.client.delete(f"/v1/requests/{job_id}")
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
    assert answer.json() == service.status(job_id)
    result = service.result(job_id)
    assert (result["status"], result["outputs"], result["error"]) == ("canceled", None, None)
    assert_time(result["finished_at"])
    again = service.client.delete(f"/v1/requests/{job_id}")
    assert error_of(again) == (409, "JOB_ALREADY_FINISHED", {"request_id": job_id, "status": "canceled"})


def test_a_running_job_is_asked_to_stop(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit())
    url = f"/v1/requests/{claim.job.id}"
    for _ in range(2):
        answer = fresh.client.delete(url)
        assert (answer.status_code, answer.json()["status"]) == (202, "in_progress")
        assert answer.json()["cancel_requested"] is True
    progress = Progress(prompt=0, prompts=1, step=1, steps=2, phase=Phase.STEP)
    assert fresh.queue.heartbeat(claim, progress, renew=True).cancel_requested
    fresh.queue.finish(claim, JobState.CANCELED)
    assert fresh.status(claim.job.id)["status"] == "canceled"
    assert fresh.client.delete(url).status_code == 409


def test_a_finished_job_is_not_canceled(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit())
    fresh.publish(claim)
    status, code, details = error_of(fresh.client.delete(f"/v1/requests/{claim.job.id}"))
    assert (status, code, details["status"]) == (409, "JOB_ALREADY_FINISHED", "succeeded")
    assert fresh.result(claim.job.id)["outputs"] is not None


def test_models_lists_the_catalogue(service: Service) -> None:
    rows = service.client.get("/v1/models").json()["models"]
    assert [row["id"] for row in rows] == list(CATALOG)
    assert rows[1] == {
        "id": "flux_kontext",
        "base_model": "black-forest-labs/FLUX.1-Kontext-dev",
        "resolution_divisor": 16,
        "default_steps": 25,
        "default_guidance_scale": 4.0,
        "requires_control_image": True,
        "is_video_model": False,
        "default_num_frames": None,
        "default_fps": None,
        "title": "FLUX.1 Kontext [dev]",
        "control_images": {"least": 1, "most": 1},
        "negative_prompt": False,
        "default_width": 1024,
        "default_height": 1024,
        "gated": True,
        "licence": "FLUX.1 [dev] Non-Commercial",
        "output_formats": ["jpeg", "png", "webp"],
        "max_loras": 1,
        "transformers": [],
        "resolutions": ["Default"],
        "options": {},
        "preview_differs": "`ctrl_img` wins over the numbered control images."
        " For sizes that are not multiples of 16, it is resized twice.",
    }


def test_health(service: Service) -> None:
    answer = service.client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "healthy"})


def test_the_description_is_valid_and_complete(service: Service) -> None:
    description = service.client.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/v1/inference",
        "/v1/loras/inspect",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/results",
        "/v1/batches/{batch_id}/retry",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/requests/{request_id}/status",
        "/v1/requests/{request_id}/result",
        "/v1/requests/{request_id}/events",
        "/v1/requests/{request_id}",
        "/v1/requests",
        "/v1/models",
        "/health",
        "/ready",
        "/outputs/{key}",
    }
    schemas = description["components"]["schemas"]

    def references(part: Any) -> set[str]:
        if isinstance(part, dict):
            own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
            return own.union(*map(references, part.values()))
        return set().union(*map(references, part)) if isinstance(part, list) else set()

    assert references(description) <= {f"#/components/schemas/{name}" for name in schemas}
    submit = description["paths"]["/v1/inference"]["post"]
    request = submit["requestBody"]["content"]["application/json"]["schema"]
    assert request == {"$ref": "#/components/schemas/InferenceRequest"}
    assert set(submit["responses"]) == {"200", "400", "409", "413", "422", "429", "500", "503"}
    assert any(parameter["name"] == "idempotency-key" for parameter in submit["parameters"])
    assert set(description["paths"]["/v1/requests/{request_id}"]["delete"]["responses"]) >= {
        "200",
        "202",
        "404",
        "409",
    }
    prompt = schemas["PromptItem"]["properties"]["width"]["anyOf"][0]
    assert (prompt["minimum"], prompt["maximum"]) == (64, 4096)


def test_the_documentation_pages_are_there(service: Service) -> None:
    for page in ("/docs", "/redoc"):
        answer = service.client.get(page)
        assert answer.status_code == 200
        assert "text/html" in answer.headers["content-type"]


def test_cors_is_off_unless_configured(service: Service, tmp_path: Path) -> None:
    origin = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in service.client.get("/health", headers=origin).headers
    with serving(tmp_path, cors_origins=["https://page.example"]) as open_service:
        allowed = open_service.client.get("/health", headers=origin)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-credentials" not in allowed.headers
        other = open_service.client.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_locked_job_table_is_a_503_that_says_when_to_try_again(fresh: Service) -> None:
    job_id = fresh.submit()
    connection = sqlite3.connect(fresh.settings.jobs.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    answer = fresh.post(body())
    assert error_of(answer) == (503, "STORE_UNAVAILABLE", {})
    assert answer.headers["retry-after"] == "1"
    # Reads still work.
    assert fresh.status(job_id)["status"] == "in_queue"
    connection.execute("ROLLBACK")
    connection.close()
    assert fresh.stored[0] == 1
    assert fresh.post(body()).status_code == 200


def test_a_failing_output_store_is_a_503_and_no_job(fresh: Service) -> None:
    outputs = fresh.settings.loras.parent / "outputs"
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.write_text("a file where the directory should be")
    assert error_of(fresh.post(kontext_body()))[:2] == (503, "STORE_UNAVAILABLE")
    assert fresh.stored[0] == 0
    outputs.unlink()
    assert fresh.post(kontext_body()).status_code == 200


def test_a_fault_of_our_own_is_json_too(fresh: Service) -> None:
    job_id = fresh.submit()
    connection = sqlite3.connect(fresh.settings.jobs.removeprefix("sqlite:///"))
    with connection:
        connection.execute("UPDATE jobs SET spec = '{}'")
    connection.close()
    answer = fresh.client.get(f"/v1/requests/{job_id}/result")
    assert error_of(answer) == (500, "INTERNAL_ERROR", {})
    # uvicorn closes the connection of a request that failed.
    assert httpx.get(f"{fresh.client.base_url}/health").status_code == 200


def test_the_janitor_brings_a_lost_job_back(fresh: Service) -> None:
    job_id = fresh.submit()
    short = JobQueue(fresh.settings.jobs, lease_s=0.1)
    assert short.claim("flux", "lost-worker") is not None
    wait_until(lambda: fresh.status(job_id)["status"] == "in_queue", 20, "the sweep")
    assert fresh.status(job_id)["attempts"] == 1
    short.close()
