"""The golden cases through the whole service: `serve run serve_config.yaml`, HTTP, PNG."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.parity.cases import MODELS, Case, load_cases, load_previews
from tests.service import finished, free_port, serve_run, submit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def committed_config(port: int) -> str:
    """The committed serve_config.yaml on another port."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    return yaml.safe_dump(config, sort_keys=False)


def environment(folder: Path, checkpoints: Path) -> dict[str, str]:
    """Copy every id's LoRAs below one root; return what the service reads."""
    for model in MODELS:
        source = Path(__file__).parent / model / "lora"
        shutil.copytree(source, folder / "loras" / model)
    return {
        "CHECKPOINTS_PATH": str(checkpoints),
        "WORKFLOWS_BASE_PATH": str(folder / "loras"),
        "OUTPUT_BASE_PATH": str(folder / "outputs"),
    }


def post(client: httpx.Client, case: Case) -> str:
    loras = [{**lora, "path": f"{case.model}/{lora['path']}"} for lora in case.request["loras"]]
    return submit(client, {**case.request, "loras": loras, "output_format": "png"})


def check(client: httpx.Client, case: Case, job_id: str) -> None:
    status = finished(client, job_id, timeout_s=400)
    assert status["status"] == "succeeded", status
    result = client.get(f"/v1/requests/{job_id}/result").json()
    images = result["outputs"]["images"]
    assert [image["seed"] for image in images] == list(case.seeds)
    assert result["metadata"]["warnings"] == []

    def pixels(url: str) -> np.ndarray:
        with Image.open(io.BytesIO(client.get(url).content)) as image:
            return np.asarray(image)

    case.check(pixels(image["url"]) for image in images)
    assert Path(images[0]["file_path"]).stat().st_size == images[0]["bytes"]


def test_every_case_through_the_committed_config(tmp_path: Path, checkpoints: Path) -> None:
    """All models share two cores: replicas come from zero, and idle ones make room for those that wait."""
    port = free_port()
    previews = [case for case in load_previews() if case.model in ("sd15", "flux2_diffusers")]
    with serve_run(committed_config(port), port, tmp_path, environment(tmp_path, checkpoints)) as client:
        jobs = [(case, post(client, case)) for case in [*load_cases(), *previews]]
        for case, job_id in jobs:
            check(client, case, job_id)


def test_behind_haproxy(tmp_path: Path, checkpoints: Path) -> None:
    port = free_port()
    env = {**environment(tmp_path, checkpoints), "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    case = next(case for case in load_cases() if case.model == "sd15")
    with serve_run(committed_config(port), port, tmp_path, env) as client:
        check(client, case, post(client, case))
