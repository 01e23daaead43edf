"""Secrets of a request and the environment, through Ray Serve: no log of Ray or ours shows them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.serve_app.conftest import body, save_pair
from tests.support.service import edited_config, free_port, serve_run, submit

KEY, SECRET_KEY, TOKEN = "Sg7key" * 4, "Sg7master" * 4, "hf_Sg7token" * 3

PROMPT = "Pr9mpt of nobody else"


@pytest.mark.slow
def test_no_log_of_the_cluster_holds_a_secret_or_prompt(tmp_path: Path) -> None:
    port = free_port()
    config = yaml.safe_load(edited_config(["flux"], port))
    config["applications"] = config["applications"][:1]  # No worker is needed.
    (tmp_path / "loras").mkdir()
    save_pair(tmp_path / "loras" / "style.safetensors")
    ray_folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    path = "https://files.example/style.safetensors?sig=Sg7query"
    request = body(hf_token=TOKEN, lora={"path": path}, prompt={"prompt": PROMPT})
    environment = {
        "RAY_TMPDIR": str(ray_folder),
        "WORKFLOWS_BASE_PATH": str(tmp_path / "loras"),
        "API_KEYS": f"alice:{KEY}",
        "SECRET_KEY": SECRET_KEY,
    }
    try:
        with serve_run(yaml.safe_dump(config), port, tmp_path, environment) as client:
            wrong = {"Authorization": "Bearer Sg7wrong"}
            for headers in ({}, wrong):
                answer = client.post("/v1/inference", json=request, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            client.headers["Authorization"] = f"Bearer {KEY}"
            job_id = submit(client, request)
            assert client.post("/v1/inference", json=request | {"prompts": [PROMPT]}).status_code == 422
            assert client.get(f"/v1/requests/{job_id}/status").json()["status"] == "in_queue"
            files = [
                file for folder in (ray_folder, tmp_path) for file in folder.rglob("*") if file.is_file()
            ]
            assert any(file.suffix == ".log" for file in files)
            assert any(file.suffix == ".db" for file in files)
            assert [file for file in files if b"Sg7" in file.read_bytes()] == []
            holding = {file.name for file in files if PROMPT.encode() in file.read_bytes()}
            assert holding and holding <= {"jobs.db", "jobs.db-wal"}
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
