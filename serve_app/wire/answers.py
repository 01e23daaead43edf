"""Response bodies: the reference server's wire format field for field, plus our additions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel

from cluster.jobs.model import Job, JobState, JobSummary, Phase
from cluster.objects.store import ObjectStore
from deployments.catalog import ModelSpec
from deployments.spec.formats import ImageFormat, VideoFormat


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


class SubmitAnswer(BaseModel):
    """Response to `POST /v1/inference`."""

    request_id: str
    status: Literal["queued"] = "queued"
    status_url: str
    result_url: str
    created_at: datetime
    warnings: list[str]

    @classmethod
    def of(cls, job: Job, base_url: str) -> Self:
        """Describe a job that was stored now, or earlier under the same idempotency key."""
        url = f"{base_url}/v1/requests/{job.id}"
        return cls(
            request_id=job.id,
            status_url=f"{url}/status",
            result_url=f"{url}/result",
            created_at=datetime.fromtimestamp(job.created_at, UTC),
            warnings=job.spec["warnings"],
        )


class ProgressAnswer(BaseModel):
    """Progress of a running job. `prompt` and `step` count from 0; `steps` is for this prompt."""

    prompt: int
    prompts: int
    step: int
    steps: int
    phase: Phase


class StatusAnswer(BaseModel):
    """Response to `GET /v1/requests/{id}/status`. `queue_position` is roughly the number of jobs ahead."""

    request_id: str
    status: JobState
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    error_code: str | None
    progress: ProgressAnswer | None
    queue_position: int | None
    attempts: int
    cancel_requested: bool

    @classmethod
    def of(cls, job: JobSummary, ahead: int | None) -> Self:
        """Describe `job`. `ahead` is the number of jobs before it, or None unless it is queued."""
        progress = job.progress
        return cls(
            request_id=job.id,
            status=job.state,
            created_at=datetime.fromtimestamp(job.created_at, UTC),
            started_at=_time(job.started_at),
            finished_at=_time(job.finished_at),
            error=job.error,
            error_code=job.error_code,
            progress=progress and ProgressAnswer.model_validate(progress, from_attributes=True),
            queue_position=ahead,
            attempts=job.attempts,
            cancel_requested=job.cancel_requested,
        )


class ListedAnswer(StatusAnswer):
    """One request in a list. `queue_position` is always null: counting for every request is too slow."""

    model: str
    batch_id: str | None

    @classmethod
    def listed(cls, job: JobSummary) -> Self:
        """Describe `job`."""
        return cls(model=job.model, batch_id=job.batch, **StatusAnswer.of(job, None).model_dump())


class ListAnswer(BaseModel):
    """Response to `GET /v1/requests`, newest first. `next_cursor` is null on the last page."""

    requests: list[ListedAnswer]
    next_cursor: str | None


class _Output(BaseModel):
    """An output file. `file_path` is an absolute path or `s3://bucket/key`; clients fetch it from `url`."""

    width: int
    height: int
    file_path: str
    seed: int
    url: str
    sha256: str
    bytes: int
    manifest_url: str

    @classmethod
    def of(cls, output: Mapping[str, Any], store: ObjectStore, base_url: str) -> Self:
        """Describe an output that a worker recorded."""
        key, manifest_key = output["key"], output["manifest_key"]
        return cls.model_validate(
            {
                **output,
                "file_path": store.location(key),
                "url": store.url(key, base_url),
                "manifest_url": store.url(manifest_key, base_url),
            }
        )


class ImageOutput(_Output):
    """One picture."""

    format: ImageFormat


class VideoOutput(_Output):
    """One video. `num_frames` is the number of frames in the file, `fps` its frames per second."""

    format: VideoFormat
    num_frames: int
    fps: int


class Outputs(BaseModel):
    """All outputs of a job, in the order of its prompts."""

    images: list[ImageOutput]
    videos: list[VideoOutput]

    @classmethod
    def of(cls, outputs: Sequence[Mapping[str, Any]], store: ObjectStore, base_url: str) -> Self:
        """Describe the outputs that a worker recorded, sorted by their `kind`."""
        images = [output for output in outputs if output["kind"] == "image"]
        videos = [output for output in outputs if output["kind"] == "video"]
        return cls(
            images=[ImageOutput.of(output, store, base_url) for output in images],
            videos=[VideoOutput.of(output, store, base_url) for output in videos],
        )


class ResultMetadata(BaseModel):
    """How a job ran. Times are in seconds, and null until the job has succeeded."""

    model: str
    inference_time: float | None
    timings: dict[str, Any] | None
    warnings: list[str]


class ResultAnswer(BaseModel):
    """Response to `GET /v1/requests/{id}/result`. `outputs` is null until the job has succeeded."""

    request_id: str
    status: JobState
    outputs: Outputs | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    metadata: ResultMetadata

    @classmethod
    def of(cls, job: Job, outputs: Outputs | None) -> Self:
        """Describe `job` and its outputs."""
        result = job.result or {}
        return cls(
            request_id=job.id,
            status=job.state,
            outputs=outputs,
            error=job.error,
            created_at=datetime.fromtimestamp(job.created_at, UTC),
            finished_at=_time(job.finished_at),
            metadata=ResultMetadata(
                model=job.model,
                inference_time=result.get("inference_time"),
                timings=result.get("timings"),
                warnings=[*job.spec["warnings"], *result.get("warnings", ())],
            ),
        )


class ControlImageCount(BaseModel):
    """How many control images a prompt takes."""

    least: int
    most: int


class ModelAnswer(BaseModel):
    """One row of `GET /v1/models`."""

    id: str
    base_model: str
    resolution_divisor: int
    default_steps: int
    default_guidance_scale: float
    requires_control_image: bool
    is_video_model: bool
    default_num_frames: int | None
    default_fps: int | None
    title: str
    control_images: ControlImageCount
    negative_prompt: bool
    default_width: int
    default_height: int
    gated: bool
    licence: str
    output_formats: tuple[str, ...]
    preview_differs: str | None
    max_loras: int
    transformers: tuple[str, ...]
    resolutions: tuple[str, ...]
    options: dict[str, bool]

    @classmethod
    def of(cls, row: ModelSpec, max_loras: int) -> Self:
        """Describe a model that takes up to `max_loras` LoRAs per request, for each of its transformers."""
        controls = row.control_images
        return cls(
            id=row.id,
            base_model=row.checkpoint.repo,
            resolution_divisor=row.divisor,
            default_steps=row.steps,
            default_guidance_scale=row.guidance,
            requires_control_image=controls.least > 0,
            is_video_model=row.video is not None,
            default_num_frames=row.video and row.video.frames,
            default_fps=row.video and row.video.fps,
            title=row.title,
            control_images=ControlImageCount(least=controls.least, most=controls.most),
            negative_prompt=row.negative_prompt,
            default_width=row.width,
            default_height=row.height,
            gated=row.checkpoint.gated,
            licence=row.licence,
            output_formats=row.formats,
            preview_differs=row.preview.differs if row.preview else None,
            max_loras=max_loras,
            transformers=tuple(row.experts),
            resolutions=("Default", "High") if row.high else ("Default",),
            options=dict(row.options),
        )


class ModelsAnswer(BaseModel):
    """Response to `GET /v1/models`, in the order of the catalogue."""

    models: list[ModelAnswer]


class HealthAnswer(BaseModel):
    """Response to `GET /health`."""

    status: Literal["healthy"] = "healthy"


class ReadyAnswer(BaseModel):
    """Response to `GET /ready`."""

    status: Literal["ready"] = "ready"
