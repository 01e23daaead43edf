"""What a row of the catalogue holds: everything about a model that is data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from deployments.catalog.control_choices import Choose, numbered_else_main
from deployments.spec.formats import ImageFormat, OutputFormat
from deployments.spec.job import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A repository in diffusers layout; `variant` names the file variant that the reference loads.

    `without` are patterns of files that are not fetched: some repositories hold the same weights twice.
    """

    repo: str
    revision: str = "main"
    variant: str | None = None
    gated: bool = False
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A component loaded apart from the others: its class by its dotted name, its folder ("" is the top)."""

    class_name: str
    checkpoint: Checkpoint
    folder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImages:
    """How many control images a prompt takes, and of what shape.

    With `most` 0, images sent are ignored, with a warning. `least_side` is in pixels; the longer side is at
    most `most_aspect` times the shorter. `choose` says which of those sent it takes.
    """

    least: int = 0
    most: int = 0
    least_side: int = 1
    most_aspect: int | None = None
    choose: Choose = numbered_else_main

    def take(self, size: tuple[int, int]) -> bool:
        """Whether an image of this size in pixels has a shape that the model takes."""
        short, long = sorted(size)
        return short >= self.least_side and (self.most_aspect is None or long <= short * self.most_aspect)


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """What a model that makes videos makes by default, and the numbers of frames that it can make.

    They are `least` and each `step` more; a request for another number gets the next lower one, but with
    `multiples_go_up` one for a multiple of `step` gets `least` frames more. Requests for less than `fewest`
    are refused; where a single frame is not, one for it gets it. `other_fps` says what becomes of one for a
    rate that is not `fps`. `sound_rate` is in samples a second where it makes sound too. `formats` begin with
    the default.
    """

    frames: int = 41
    fps: int = 16
    least: int = 1
    step: int = 4
    multiples_go_up: bool = False
    fewest: int = 1
    other_fps: Literal["taken", "refused", "ignored"] = "taken"
    sound_rate: int | None = None
    formats: tuple[OutputFormat, ...] = ("webp", "mp4")

    def floor(self, frames: int) -> int:
        """Return how many frames a request for `frames` gets."""
        if frames == 1:
            return 1
        steps = (frames if self.multiples_go_up else frames - self.least) // self.step
        return self.least + self.step * max(steps, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HighResolution:
    """What `"resolution": "High"` needs beside the model; it is fetched for the first such request.

    `render` names a function in `pipelines`, by its dotted name there. It gets the `upsampler` and makes the
    `lora`, a repository of one file, active with its `multiplier` when it refines.
    """

    render: str
    upsampler: Part
    lora: Checkpoint
    multiplier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """How the trainer's own sample pictures differ: in a sentence, and as other values of the row's fields.

    Fields that only the loading of a pipeline reads cannot differ, unless `fields` are another id's row.
    """

    differs: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model id; it makes videos where it has a `video`, else pictures.

    `pipeline` and the scheduler's class are diffusers class names, `pipeline` one of ours with its module in
    front; `scheduler` replaces the repository's own.
    `image_pipeline` takes the place of `pipeline`, over the same components, for prompts with control images.
    `parts` are components from other repositories, or of classes of ours; a model that is `assembled` has no
    other components. `experts` are the components of the two transformers by their names in requests, if
    there are two.
    Defaults are the reference server's: sizes in pixels, floored to `divisor` in requests.
    `guidance_argument` is what the pipeline's call names guidance; the negative prompt is passed where the
    call has one. `call_options` are passed to every call. `adjust`, `arguments` and `during` name functions
    of the family's module in `pipelines`, or of another one there by its dotted name: the first changes the
    loaded pipeline, the second adds arguments to its call, the third is a context manager around the call.
    `high` is there if the model has a high resolution, of twice the size asked for.
    `options` are the switches of requests that the model has, by the names of their fields, with defaults.
    With `products_in_file_dtype` the product of a LoRA's matrices is rounded to the dtype of its file.
    `memory_gib` is the size of each part in bfloat16, `activations_gib` about what a prompt of the
    default size needs beside them. `licence` is the SPDX name or the licence's own.
    `preview` is there unless the trainer's previews differ by nothing but the rules for its prompts.
    """

    id: str
    family: str
    title: str
    pipeline: str
    checkpoint: Checkpoint
    steps: int
    guidance: float
    divisor: int
    width: int = 1024
    height: int = 1024
    scheduler: tuple[str, Mapping[str, Any]] | None = None
    image_pipeline: str | None = None
    parts: Mapping[str, Part] = field(default_factory=lambda: MappingProxyType({}))
    assembled: bool = False
    experts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    load_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    call_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    guidance_argument: str = "guidance_scale"
    negative_prompt: bool = True
    control_images: ControlImages = ControlImages()
    options: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    adjust: str | None = None
    arguments: str | None = None
    products_in_file_dtype: bool = False
    during: str | None = None
    high: HighResolution | None = None
    memory_gib: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    activations_gib: float = 4.0
    licence: str = ""
    video: Video | None = None
    preview: Preview | None = None

    @property
    def formats(self) -> tuple[OutputFormat, ...]:
        """The file formats that it can be asked for, its default first."""
        return self.video.formats if self.video else get_args(ImageFormat)

    def sampled(self, sampling: Sampling) -> ModelSpec:
        """Return the row that holds for a request's `sampling`; for a preview it may be another id's."""
        return replace(self, **self.preview.fields) if self.preview and sampling == "preview" else self
