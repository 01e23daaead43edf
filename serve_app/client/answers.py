"""Typed answers of the service. Fields that the reference server does not send are optional.

Fields that a newer server adds are kept, and are part of `model_dump()`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cluster.jobs.model import JobState


def _drop_second_zone(value: object) -> object:
    """Remove the `Z` from times of the reference server, which end in `+00:00Z`."""
    return value.removesuffix("Z") if isinstance(value, str) and value.endswith("+00:00Z") else value


Time = Annotated[datetime, BeforeValidator(_drop_second_zone)]

NamePart = Annotated[str, Field(pattern=r"^[\w-]+$")]
"""A text that becomes part of a local file name. It has no slashes, so a server cannot choose the folder."""


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Submitted(Answer):
    """A stored request."""

    request_id: str
    created_at: Time
    warnings: tuple[str, ...] = ()


class Progress(Answer):
    """Progress of a running job. `prompt` and `step` count from 0; `steps` is the total of this prompt."""

    prompt: int
    prompts: int
    step: int
    steps: int
    phase: str


class Status(Answer):
    """Status of a job. The reference server does not send `error_code` and the fields after it."""

    request_id: str
    status: JobState
    created_at: Time
    started_at: Time | None = None
    finished_at: Time | None = None
    error: str | None = None
    error_code: str | None = None
    progress: Progress | None = None
    queue_position: int | None = None
    attempts: int | None = None
    cancel_requested: bool = False

    @property
    def ended(self) -> bool:
        """True if the job has ended and cannot change again."""
        return self.status.terminal


class Output(Answer):
    """One picture or video; `width` and `height` are in pixels. Only videos have `num_frames` and `fps`.

    `file_path` is a path on the server's disk, or `s3://bucket/key`. The reference server does not send `url`
    and the fields after it.
    """

    format: NamePart
    width: int
    height: int
    file_path: str
    seed: int
    num_frames: int | None = None
    fps: int | None = None
    url: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    manifest_url: str | None = None


class Outputs(Answer):
    """Outputs of a job, in the order of its prompts."""

    images: tuple[Output, ...]
    videos: tuple[Output, ...]

    @property
    def files(self) -> tuple[Output, ...]:
        """All outputs. A job makes either pictures or videos, never both."""
        return self.images + self.videos


class Metadata(Answer):
    """How a job ran. Times are in seconds, and None until the job has succeeded."""

    model: str | None = None
    inference_time: float | None = None
    timings: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


class Result(Answer):
    """Result of a job; `outputs` is None until the job has succeeded."""

    request_id: NamePart
    status: JobState
    outputs: Outputs | None
    error: str | None = None
    created_at: Time
    finished_at: Time | None = None
    metadata: Metadata = Metadata()

    def named(self) -> list[tuple[str, Output]]:
        """Return each output with a unique file name, `REQUEST_ID-INDEX.FORMAT`."""
        files = self.outputs.files if self.outputs else ()
        return [(f"{self.request_id}-{index}.{file.format}", file) for index, file in enumerate(files)]


class ControlImages(Answer):
    """Minimum and maximum number of control images per prompt."""

    least: int
    most: int


class Model(Answer):
    """A model of the service. The reference server does not send `title` and the fields after it."""

    id: str
    base_model: str
    resolution_divisor: int
    default_steps: int
    default_guidance_scale: float
    requires_control_image: bool
    is_video_model: bool
    default_num_frames: int | None = None
    default_fps: int | None = None
    title: str | None = None
    control_images: ControlImages | None = None
    negative_prompt: bool | None = None
    default_width: int | None = None
    default_height: int | None = None
    gated: bool | None = None
    licence: str | None = None
    output_formats: tuple[str, ...] | None = None
    preview_differs: str | None = None
    max_loras: int | None = None


class Models(Answer):
    """Answer of `GET /v1/models`."""

    models: tuple[Model, ...]
