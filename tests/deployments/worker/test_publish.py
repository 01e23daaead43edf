"""Publishing of videos: encoding under the lease, storing from a file, and stops between two frames."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from cluster.jobs.model import Job, JobState, NewJob, Phase
from cluster.jobs.queue import JobQueue
from cluster.objects.directory import DirectoryStore
from deployments.engine.media import Media
from deployments.spec.formats import OutputFormat
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec
from deployments.spec.lora_reference import parse
from deployments.worker import publish
from deployments.worker.publish import Publisher
from deployments.worker.run import STALL_LIMITS_S, Run, Stop, Stopped

FRAMES = np.zeros((9, 32, 48, 3), np.uint8)


@dataclass
class Desk:
    """A publisher with its own job table and directory."""

    queue: JobQueue
    store: DirectoryStore
    publisher: Publisher = field(init=False)

    def __post_init__(self) -> None:
        self.publisher = Publisher(self.queue, self.store, lambda run: None)

    def claimed(self, format: OutputFormat) -> Run:
        prompt = PromptSpec(
            prompt="a dog", neg="", width=48, height=32, steps=1, guidance=1.0, seed=7, num_frames=8, fps=12
        )
        loras = (LoraSpec(path=parse("a.safetensors")),)
        spec = RenderSpec(model="wan21_1b", loras=loras, prompts=(prompt,), output_format=format)
        self.queue.submit(
            [NewJob(id=str(uuid.uuid4()), model=spec.model, spec=spec.model_dump(mode="json"), adapter="a")]
        )
        claim = self.queue.claim(spec.model, "worker@test:1:a")
        assert claim is not None
        return Run(claim)

    def publish(self, run: Run, frames: np.ndarray = FRAMES) -> Job:
        """Publish one video, settle the job and return it."""
        self.publisher.publish(run, 0, Media(frames, fps=12), {"model": "wan21_1b"})
        self.publisher.settle(run, {"inference_time": 1.0}).result()
        job = self.queue.get(run.claim.job.id)
        assert job is not None
        return job


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    queue = JobQueue(f"sqlite:///{tmp_path}/jobs.db", lease_s=30)
    made = Desk(queue, DirectoryStore(tmp_path / "outputs"))
    yield made
    made.publisher.close()
    queue.close()


@pytest.mark.parametrize("format", ["webp", "mp4"])
def test_a_video_is_stored_and_recorded(desk: Desk, format: OutputFormat) -> None:
    run = desk.claimed(format)
    job = desk.publish(run)
    (output,) = desk.queue.outputs(job.id)
    assert job.state is JobState.SUCCEEDED
    file = desk.store.local_path(output["key"])
    assert file is not None and file.suffix == f".{format}"
    assert file.stat().st_size == output["bytes"]
    measures = {"width": 48, "height": 32, "num_frames": 9, "fps": 12}
    assert {name: output[name] for name in measures} == measures
    assert (output["kind"], output["format"], output["seed"]) == ("video", format, 7)
    beside = json.loads(desk.store.get(output["manifest_key"]))
    assert beside == {"model": "wan21_1b", "sha256": output["sha256"], "bytes": output["bytes"]}
    if format == "mp4":
        assert imageio_ffmpeg.count_frames_and_secs(file)[0] == 9


class Frames(np.ndarray):
    """Frames that call `taken` when one is read for encoding."""

    taken: Callable[[int], None]

    def __getitem__(self, key: object) -> np.ndarray:
        if isinstance(key, int):
            self.taken(key)
        return super().__getitem__(key)  # type: ignore[index]

    def __array_finalize__(self, source: object) -> None:
        self.taken = getattr(source, "taken", lambda _: None)


def test_encoding_counts_as_movement_and_stops_between_frames(desk: Desk, tmp_path: Path) -> None:
    run = desk.claimed("webp")
    seen: list[int] = []
    stale: list[bool] = []

    def taken(index: int) -> None:
        seen.append(index)
        stale.append(run.stalled({**STALL_LIMITS_S, Phase.PUBLISH: 0.05}))
        time.sleep(0.06)
        if len(seen) == 4:
            run.stop(Stop.CANCELED)

    frames = FRAMES.view(Frames)
    frames.taken = taken
    run.on_phase(Phase.PUBLISH)
    job = desk.publish(run, frames)
    assert (job.state, len(seen)) == (JobState.CANCELED, 4)
    assert not any(stale[1:])
    assert desk.queue.outputs(job.id) == []
    assert not (tmp_path / "outputs").exists()


def test_movement_is_noted_in_any_phase(desk: Desk) -> None:
    run = desk.claimed("webp")
    run.on_phase(Phase.STEP)
    time.sleep(0.02)
    assert run.stalled({**STALL_LIMITS_S, Phase.STEP: 0.01})
    run.moved()
    assert not run.stalled({**STALL_LIMITS_S, Phase.STEP: 10})
    assert run.progress.phase is Phase.STEP
    run.stop(Stop.CANCELED)
    with pytest.raises(Stopped):
        run.moved()


def test_what_cannot_be_encoded_is_tried_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RETRY_DELAY_S", 60.0)
    # H.264 in 4:2:0 does not allow odd sides.
    job = desk.publish(desk.claimed("mp4"), np.zeros((2, 31, 48, 3), np.uint8))
    assert (job.state, job.attempts) == (JobState.IN_QUEUE, 1)
    assert desk.queue.outputs(job.id) == []
