"""A golden case of every id through the whole service: `serve run serve_config.yaml`, HTTP, files."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image, ImageSequence

from deployments.catalog import CATALOG
from deployments.engine.media import Media, save
from deployments.engine.videos import Sound
from tests.parity.cases import MODELS, Case, load_cases, load_previews
from tests.support.service import finished, free_port, serve_run, submit
from tests.support.videos import read_mp4, read_sound

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def committed_config(port: int) -> str:
    """The committed serve_config.yaml on another port."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    return yaml.safe_dump(config, sort_keys=False)


def environment(folder: Path, checkpoints: Path) -> dict[str, str]:
    """Copy every id's LoRAs below one root; return the service's environment variables."""
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
    exact = {} if CATALOG[case.model].video else {"output_format": "png"}
    return submit(client, {**case.request, "loras": loras, **exact})


def check(client: httpx.Client, case: Case, job_id: str) -> None:
    status = finished(client, job_id, timeout_s=900)
    assert status["status"] == "succeeded", status
    result = client.get(f"/v1/requests/{job_id}/result").json()
    images, videos = result["outputs"]["images"], result["outputs"]["videos"]
    assert [output["seed"] for output in (*images, *videos)] == list(case.seeds)
    assert result["metadata"]["warnings"] == []
    if videos:
        sounds = [as_samples(file, rate) for file, rate in case.sounds] or [None] * len(videos)
        for video, file, fps, sound in zip(videos, case.files, case.fps, sounds, strict=True):
            check_video(client, video, Media(np.load(file), fps=fps, sound=sound))
    else:
        case.check(pixels(fetched(client, image))[0] for image in images)
    first = (*images, *videos)[0]
    assert Path(first["file_path"]).stat().st_size == first["bytes"]


def fetched(client: httpx.Client, output: dict[str, Any]) -> io.BytesIO:
    return io.BytesIO(client.get(output["url"]).content)


def pixels(file: io.BytesIO | Path) -> np.ndarray:
    """Decode a picture or an animation that Pillow reads: F x H x W x 3."""
    with Image.open(file) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def as_samples(file: Path, rate: int) -> Sound:
    return Sound((np.load(file) / 32767).astype(np.float32), rate)


def check_video(client: httpx.Client, video: dict[str, Any], golden: Media) -> None:
    """Check a video against its golden, which is encoded with the same codec for the comparison."""
    format = "mp4" if golden.sound else "webp"
    assert video["format"] == format
    assert {name: video[name] for name in golden.measures} == golden.measures
    with tempfile.TemporaryDirectory() as folder:
        ours, expected = Path(folder, f"ours.{format}"), Path(folder, f"golden.{format}")
        ours.write_bytes(fetched(client, video).read())
        save(golden, format, {}, expected)
        if format == "webp":
            frames, golden_frames = pixels(ours), pixels(expected)
        else:
            frames, golden_frames = read_mp4(ours)[1], read_mp4(expected)[1]
        assert np.abs(frames.astype(int) - golden_frames).mean() < 1
        if golden.sound:
            check_sound(read_sound(ours), read_sound(expected), golden.sound)


def check_sound(ours: tuple[str, Sound] | None, encoded: tuple[str, Sound] | None, golden: Sound) -> None:
    """Check that the codec lost no more of our sound than of the golden. The loss is large: it is noise."""
    assert ours is not None and encoded is not None
    assert ours[1].rate == encoded[1].rate == golden.rate
    length = golden.samples.shape[1]
    lost, lost_of_golden = (
        np.abs(sound.samples[:, :length] - golden.samples).mean() for _, sound in (ours, encoded)
    )
    assert lost < 1.1 * lost_of_golden


@pytest.mark.timeout(1200)
def test_every_id_through_the_committed_config(tmp_path: Path, checkpoints: Path) -> None:
    """All models share two cores: they start from zero replicas, and idle ones yield to waiting models."""
    port = free_port()
    cases = {case.model: case for case in reversed(load_cases())}
    previews = [case for case in load_previews() if case.model in ("sd15", "flux2_diffusers")]
    with serve_run(committed_config(port), port, tmp_path, environment(tmp_path, checkpoints)) as client:
        jobs = [(case, post(client, case)) for case in [*cases.values(), *previews]]
        for case, job_id in jobs:
            check(client, case, job_id)


def test_behind_haproxy(tmp_path: Path, checkpoints: Path) -> None:
    port = free_port()
    env = {**environment(tmp_path, checkpoints), "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    case = next(case for case in load_cases() if case.model == "sd15")
    with serve_run(committed_config(port), port, tmp_path, env) as client:
        check(client, case, post(client, case))
