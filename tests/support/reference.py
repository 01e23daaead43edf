"""A stand-in for the reference server: no long polls, no idempotency keys, no DELETE, no URLs."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from PIL import Image
from pydantic import BaseModel

QUEUED_S, RUN_S = 0.2, 0.4
"""How long each job waits and runs, in seconds."""


class Body(BaseModel):
    """The request fields that the reference server reads; it ignores the rest."""

    model: str
    loras: list[dict[str, Any]]
    prompts: list[dict[str, Any]]


def create_reference(folder: Path) -> FastAPI:
    """Return the application. It writes pictures to `folder` and keeps jobs by id in `app.state.jobs`."""
    app = FastAPI()
    jobs: dict[str, dict[str, Any]] = {}
    app.state.jobs = jobs

    @app.post("/v1/inference")
    def submit(body: Body) -> dict[str, Any]:
        if body.model != "flux":
            raise _error(
                400, "MODEL_NOT_FOUND", f"Model {body.model} is not there", supported_models=["flux"]
            )
        if len(body.loras) > 1:
            raise RuntimeError("its details.loras cannot be serialised")
        job_id = str(uuid.uuid4())
        jobs[job_id] = {"at": time.time(), "body": body}
        return {
            "request_id": job_id,
            "status": "queued",
            "status_url": f"http://localhost/v1/requests/{job_id}/status",
            "result_url": f"http://localhost/v1/requests/{job_id}/result",
            "created_at": _time(jobs[job_id]["at"]),
        }

    @app.get("/v1/requests/{job_id}/status")
    def status(job_id: str) -> dict[str, Any]:
        started, ended, state = _life(jobs, job_id)
        error = "Something went wrong" if state == "failed" else None
        times = {"created_at": _time(jobs[job_id]["at"]), "started_at": started, "finished_at": ended}
        return {"request_id": job_id, "status": state, **times, "error": error}

    @app.get("/v1/requests/{job_id}/result")
    def result(job_id: str) -> dict[str, Any]:
        _, ended, state = _life(jobs, job_id)
        body = jobs[job_id]["body"]
        made = {"images": [_picture(folder, job_id, n) for n in range(len(body.prompts))], "videos": []}
        return {
            "request_id": job_id,
            "status": state,
            "outputs": made if state == "succeeded" else None,
            "error": None,
            "created_at": _time(jobs[job_id]["at"]),
            "finished_at": ended,
            "metadata": {"model": body.model, "inference_time": 0.4, "timings": {}},
        }

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        row = {
            "id": "flux",
            "base_model": "black-forest-labs/FLUX.1-dev",
            "resolution_divisor": 16,
            "default_steps": 25,
            "default_guidance_scale": 4.0,
            "requires_control_image": False,
            "is_video_model": False,
            "default_num_frames": None,
            "default_fps": None,
        }
        return {"models": [row]}

    return app


def _life(jobs: dict[str, dict[str, Any]], job_id: str) -> tuple[str | None, str | None, str]:
    """Return a job's start time, end time and state. The prompt "fail" makes it fail."""
    if job_id not in jobs:
        raise _error(404, "REQUEST_NOT_FOUND", "No such request", request_id=job_id)
    start = jobs[job_id]["at"] + QUEUED_S
    now = time.time()
    if now < start:
        return None, None, "in_queue"
    if now < start + RUN_S:
        return _time(start), None, "in_progress"
    failed = jobs[job_id]["body"].prompts[0]["prompt"] == "fail"
    return _time(start), _time(start + RUN_S), "failed" if failed else "succeeded"


def _picture(folder: Path, job_id: str, index: int) -> dict[str, Any]:
    file = folder / f"{job_id}_{index}.jpg"
    Image.new("RGB", (64, 48), (90 * index, 99, 180)).save(file, "JPEG", quality=95)
    return {"format": "jpeg", "width": 64, "height": 48, "file_path": str(file), "seed": 42 + index}


def _time(seconds: float) -> str:
    """Return a time in the format of the reference server, which has two time zones."""
    return datetime.fromtimestamp(seconds, UTC).isoformat() + "Z"


def _error(status: int, code: str, message: str, **details: Any) -> HTTPException:
    return HTTPException(status, {"error": {"code": code, "message": message, "details": details}})
