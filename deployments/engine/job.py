"""A whole job on one engine: LoRAs in, one picture or video per prompt out, each with its manifest.

Workers and `lora-serve render` share this path, so a mismatch can be hunted without a cluster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from PIL import Image

from cluster.failures import FailureCode, JobFailure
from cluster.jobs.model import Phase
from deployments.engine.control_images import Controls
from deployments.engine.engine import Engine
from deployments.engine.media import Media
from deployments.engine.progress import Observer
from deployments.loras.sources.lora_root import LoraFile
from deployments.loras.sources.loras import Tick
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec, bare

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Weighted: TypeAlias = list[tuple[LoraFile, LoraSpec]]


class LoraOpener(Protocol):
    """Where a job's LoRAs come from: `Loras`, or what was brought for the job."""

    def open(self, lora: LoraSpec, *, tick: Tick, token: str | None) -> AbstractContextManager[LoraFile]:
        """As `Loras.open`."""
        ...


class JobObserver(Observer, Protocol):
    """Who follows a whole job; may raise from any method to end it."""

    def begin_prompt(self, index: int) -> None:
        """Prompt `index` is next."""
        ...


class Unwatched:
    """Observer of a job that nobody follows."""

    def begin_prompt(self, index: int) -> None:
        """Nothing to tell."""

    def on_phase(self, phase: Phase) -> None:
        """Nothing to tell."""

    def on_step(self, done: int, total: int) -> None:
        """Nothing to tell."""


@dataclass(slots=True)
class Report:
    """What a job tells beside its outputs: warnings, seconds by part, and the sha256 of its adapters."""

    warnings: list[str] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rendered:
    """One prompt's media before any encoding, and what produced it."""

    index: int
    media: Media
    manifest: Mapping[str, Any]


def render_job(
    engine: Engine,
    spec: RenderSpec,
    *,
    loras: LoraOpener,
    controls: Controls,
    observer: JobObserver,
    report: Report,
    skip: Collection[int] = (),
    hf_token: str | None = None,
) -> Iterator[Rendered]:
    """Render the prompts of `spec` in order, without those in `skip`.

    `loras` and `controls` open what the job names; `hf_token` wins over the server's own. Warnings and
    timings are added to `report`. Raises `JobFailure` where the job itself is at fault or the device has no
    room, and whatever the observer raises.
    """

    def fetching() -> None:
        observer.on_phase(Phase.FETCH)

    with ExitStack() as leases:
        fetching()
        begun = time.monotonic()
        chosen = [
            (leases.enter_context(loras.open(lora, tick=fetching, token=hf_token)), lora)
            for lora in spec.loras
        ]
        report.adapters = frozenset(file.sha256 for file, _ in chosen)
        observer.on_phase(Phase.LOAD)
        fetched = time.monotonic()
        report.warnings += _fitting(engine, "the LoRA", partial(_use, engine, chosen))
        report.timings |= {"fetch": fetched - begun, "adapters": time.monotonic() - fetched, "prompts": []}
        held: dict[str, Image.Image] = {}
        for index, prompt in enumerate(spec.prompts):
            if index in skip:
                continue
            observer.begin_prompt(index)
            # Prompts in a row often have the same images.
            held = {name: held.get(name) or controls.open(name, fetching) for name in prompt.controls}
            started = time.monotonic()
            images = [_shaped(engine, prompt, held[name]) for name in prompt.controls]
            weighted = [(file, _weigh(lora, prompt)) for file, lora in chosen]
            render = partial(_render, engine, weighted, prompt, images, observer)
            media = _fitting(engine, f"{prompt.width}x{prompt.height}", render)
            report.timings["prompts"].append(time.monotonic() - started)
            yield Rendered(index, media, _manifest(engine, prompt, weighted) | media.measures)


def _shaped(engine: Engine, prompt: PromptSpec, image: Image.Image) -> Image.Image:
    """Return the image if the model takes its shape; of one from the web nobody knew it before."""
    if not engine.spec.sampled(prompt.sampling).control_images.take(image.size):
        message = f"the model takes no control image of {image.width}x{image.height}"
        raise JobFailure(FailureCode.CONTROL_IMAGE_SHAPE, message)
    return image


def _weigh(lora: LoraSpec, prompt: PromptSpec) -> LoraSpec:
    """Return the LoRA with the weight that the prompt gives it, if it does."""
    return lora if prompt.multiplier is None else lora.model_copy(update={"multiplier": prompt.multiplier})


def _use(engine: Engine, weighted: _Weighted) -> list[str]:
    return engine.use([(replace(file, expert=lora.transformer), lora.multiplier) for file, lora in weighted])


def _render(
    engine: Engine, weighted: _Weighted, prompt: PromptSpec, controls: list[Image.Image], observer: Observer
) -> Media:
    _use(engine, weighted)  # Free unless a lack of memory has dropped them.
    return engine.render(prompt, controls, observer)


def _fitting(engine: Engine, what: str, action: Callable[[], _T]) -> _T:
    """Run `action`; where the device has no room for it, drop all adapters and run it once more."""
    try:
        return action()
    except RuntimeError as error:
        if not _lacks_memory(error):
            raise
        logger.warning("out of device memory for %s; adapters are dropped for a second try", what)
    # Outside of the handler: the exception's frames hold the tensors that have to go.
    engine.drop_adapters()
    try:
        return action()
    except RuntimeError as error:
        if not _lacks_memory(error):
            raise
        message = f"there is no room for {what} in the memory of the device"
        raise JobFailure(FailureCode.OUT_OF_MEMORY, message) from error


def _lacks_memory(error: RuntimeError) -> bool:
    """Whether the device had no room; on the CPU torch says so in words only (alloc_cpu.cpp)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _manifest(engine: Engine, prompt: PromptSpec, weighted: _Weighted) -> dict[str, Any]:
    used = [
        {**lora.model_dump(exclude_none=True), "path": lora.path.public, "sha256": file.sha256}
        for file, lora in weighted
    ]
    parameters = {**prompt.model_dump(), "controls": tuple(bare(control) for control in prompt.controls)}
    return {**engine.describe(), "loras": used, "parameters": parameters}
