"""What the client makes of the service's answers, typed; what only our server says may be absent.

Fields that a newer server adds are kept, and are part of `model_dump()`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cluster.jobs.model import JobState


def _one_zone(value: object) -> object:
    """Take one zone from the reference server's times: they end in `+00:00Z`."""
    return value.removesuffix("Z") if isinstance(value, str) and value.endswith("+00:00Z") else value


Time = Annotated[datetime, BeforeValidator(_one_zone)]

NamePart = Annotated[str, Field(pattern=r"^[\w-]+$")]
"""What may become part of a file's name here: no server chooses a directory."""


class Answer(BaseModel):
    """What every answer has in common."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Submitted(Answer):
    """A stored request."""

    request_id: str
    created_at: Time
    warnings: tuple[str, ...] = ()


class Progress(Answer):
    """How far a running job is; prompt and step count from 0, `steps` is of this prompt."""

    prompt: int
    prompts: int
    step: int
    steps: int
    phase: str


class Status(Answer):
    """How a job is doing; from `error_code` on, fields of our server."""

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
        """Whether the job never changes again."""
        return self.status.terminal


class Output(Answer):
    """One picture or video: sides in pixels; `num_frames` and `fps` are of videos.

    From `url` on, fields of our server; `file_path` is a path on the server's disk, or `s3://bucket/key`.
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
    """What a job made, in the order of its prompts."""

    images: tuple[Output, ...]
    videos: tuple[Output, ...]

    @property
    def files(self) -> tuple[Output, ...]:
        """Pictures and videos; a job has one kind of them."""
        return self.images + self.videos


class Metadata(Answer):
    """How a job ran; seconds, null until it succeeded."""

    model: str | None = None
    inference_time: float | None = None
    timings: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


class Result(Answer):
    """What a job made; `outputs` is null until it succeeded."""

    request_id: NamePart
    status: JobState
    outputs: Outputs | None
    error: str | None = None
    created_at: Time
    finished_at: Time | None = None
    metadata: Metadata = Metadata()

    def named(self) -> list[tuple[str, Output]]:
        """Return each file with a name that no other has: `REQUEST_ID-INDEX.FORMAT`."""
        files = self.outputs.files if self.outputs else ()
        return [(f"{self.request_id}-{index}.{file.format}", file) for index, file in enumerate(files)]


class ControlImages(Answer):
    """How many control images a prompt takes."""

    least: int
    most: int


class Model(Answer):
    """A model that the service renders; from `title` on, fields of our server."""

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
