"""The catalogue's row type: everything about a model that is data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from deployments.catalog.control_choices import Choose, numbered_else_main
from deployments.spec.formats import ImageFormat, OutputFormat
from deployments.spec.job import Sampling

if TYPE_CHECKING:
    from PIL import Image

    from deployments.spec.job import PromptSpec

Adjust: TypeAlias = Callable[[Any], None]
"""Changes a freshly loaded pipeline."""

Arguments: TypeAlias = "Callable[[Any, PromptSpec, Sequence[Image.Image]], dict[str, Any]]"
"""Returns extra arguments for the pipeline's call, from the pipeline, the prompt and its control images."""

During: TypeAlias = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]
"""A context manager around the pipeline's call. It gets the pipeline and the call's arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A repository in diffusers layout; `variant` is the file variant that the reference server loads.

    Files that match a pattern in `without` are not fetched: some repositories hold the same weights twice.
    """

    repo: str
    revision: str = "main"
    variant: str | None = None
    gated: bool = False
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A component that is loaded separately, from a folder of its checkpoint ("" is the top).

    `class_name` is one of our classes, or the dotted name of a library's class.
    """

    class_name: str | type[Any]
    checkpoint: Checkpoint
    folder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImages:
    """How many control images a prompt takes, and in which shapes.

    If `most` is 0, images in a request are ignored, with a warning. `least_side` is in pixels. The longer
    side is at most `most_aspect` times the shorter. `choose` picks the images to use from the request's.
    """

    least: int = 0
    most: int = 0
    least_side: int = 1
    most_aspect: int | None = None
    choose: Choose = numbered_else_main

    def take(self, size: tuple[int, int]) -> bool:
        """Return whether the model accepts an image of this size in pixels."""
        short, long = sorted(size)
        return short >= self.least_side and (self.most_aspect is None or long <= short * self.most_aspect)


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """A video model's defaults, and the numbers of frames that it can render.

    It can render `least` frames plus any multiple of `step`. Other numbers are rounded down, except that
    with `multiples_go_up` a multiple of `step` gets `least` frames more. Requests for fewer than `fewest`
    frames are refused; if `fewest` is 1, a request for one frame gets one frame. `other_fps` says how to
    handle a request with another rate than `fps`. `sound_rate` is in samples per second, None without sound.
    The first of `formats` is the default.
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
    """What `"resolution": "High"` needs besides the model. The first such request downloads it.

    `render` is a function in `deployments.pipelines`. It gets the `upsampler`, and for the refinement
    activates `lora`, a repository with one file, with `multiplier`.
    """

    render: Callable[..., Any]
    upsampler: Part
    lora: Checkpoint
    multiplier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """How the trainer's own sample pictures differ: in words, and as other values for the row's fields.

    Fields that are only read when a pipeline is loaded cannot differ, unless `fields` is another id's row.
    """

    differs: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model id. It makes videos if it has a `video`, otherwise pictures.

    `pipeline` is a diffusers class name or one of our classes. `scheduler` replaces the repository's own; its
    class is a diffusers class name.
    For prompts with control images, `image_pipeline` replaces `pipeline`, with the same components.
    `parts` are components from other repositories, or of our own classes; a model that is `assembled` has no
    other components. If there are two transformers, `experts` maps their names in requests to components.
    Defaults are the reference server's. Sizes are in pixels; requested ones are rounded down to a multiple
    of `divisor`.
    `guidance_argument` is the name of guidance in the pipeline's call; the negative prompt is passed if the
    call takes one. `call_options` are passed to every call. `adjust`, `arguments` and `during` are functions
    in `deployments.pipelines`, named through `lazy`: the first changes the loaded pipeline, the second adds
    arguments to its call, the third is a context manager around the call.
    `high` is set if the model has a high resolution, of twice the requested size.
    `options` are the model's switches in requests: names of fields, with defaults.
    With `products_in_file_dtype` the product of a LoRA's matrices is rounded to the dtype of its file.
    `memory_gib` is the size of each part in bfloat16. `activations_gib` is about what a prompt of the default
    size needs in addition. `licence` is the SPDX name or the licence's own name.
    `preview` is None if the trainer's previews differ only in the rules for its prompts.
    """

    id: str
    family: str
    title: str
    pipeline: str | type[Any]
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
    adjust: Adjust | None = None
    arguments: Arguments | None = None
    products_in_file_dtype: bool = False
    during: During | None = None
    high: HighResolution | None = None
    memory_gib: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    activations_gib: float = 4.0
    licence: str = ""
    video: Video | None = None
    preview: Preview | None = None

    @property
    def formats(self) -> tuple[OutputFormat, ...]:
        """The file formats that a request can ask for, the default first."""
        return self.video.formats if self.video else get_args(ImageFormat)

    def sampled(self, sampling: Sampling) -> ModelSpec:
        """Return the row to use for a request's `sampling`; for a preview it can be another id's row."""
        return replace(self, **self.preview.fields) if self.preview and sampling == "preview" else self
