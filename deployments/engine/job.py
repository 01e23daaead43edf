"""Renders a whole job on one engine: one picture or video per prompt, each with its manifest.

Workers and `lora-serve render` share this path, so a mismatch can be debugged without a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

from PIL import Image

from cluster.failures import FailureCode, JobFailure
from cluster.jobs.model import Phase
from deployments.engine.control_images import Controls
from deployments.engine.engine import Engine
from deployments.engine.media import Media
from deployments.engine.out_of_memory import fit
from deployments.engine.progress import Observer
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.loras import Tick
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec, bare

_Weighted: TypeAlias = list[tuple[LoraFile, LoraSpec]]


class LoraOpener(Protocol):
    """Opens a job's LoRAs: `Loras`, or the `Arrival` of LoRAs prefetched for the job."""

    def open(self, lora: LoraSpec, *, tick: Tick, token: str | None) -> AbstractContextManager[LoraFile]:
        """As `Loras.open`."""
        ...


class JobObserver(Observer, Protocol):
    """Receives the progress of a whole job. May raise from any method to end the job."""

    def begin_prompt(self, index: int) -> None:
        """Handle that prompt `index` is next."""
        ...


class Unwatched:
    """Observer that ignores all progress."""

    def begin_prompt(self, index: int) -> None:
        """Do nothing."""

    def on_phase(self, phase: Phase) -> None:
        """Do nothing."""

    def on_step(self, done: int, total: int) -> None:
        """Do nothing."""


@dataclass(slots=True)
class Report:
    """What a job reports besides its outputs: warnings, seconds by part, and the sha256 of its adapters."""

    warnings: list[str] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rendered:
    """One prompt's media before any encoding, and the manifest that says what produced it."""

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
    """Render the prompts of `spec` in order, except those in `skip`.

    `loras` and `controls` open the job's LoRAs and control images. `hf_token` takes precedence over the
    server's token. Warnings and timings are added to `report`. Raises `JobFailure` if the job itself is at
    fault or the device has too little memory, and whatever the observer raises.
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
        report.warnings += fit(engine, "the LoRA", partial(_use, engine, chosen))
        report.timings |= {"fetch": fetched - begun, "adapters": time.monotonic() - fetched, "prompts": []}
        opened: dict[str, Image.Image] = {}
        for index, prompt in enumerate(spec.prompts):
            if index in skip:
                continue
            observer.begin_prompt(index)
            # Consecutive prompts often have the same images.
            opened = {name: opened.get(name) or controls.open(name, fetching) for name in prompt.controls}
            started = time.monotonic()
            images = [_check_shape(engine, prompt, opened[name]) for name in prompt.controls]
            weighted = [(file, _with_multiplier(lora, prompt)) for file, lora in chosen]
            render = partial(_render, engine, weighted, prompt, images, observer)
            media = fit(engine, f"{prompt.width}x{prompt.height}", render)
            report.timings["prompts"].append(time.monotonic() - started)
            yield Rendered(index, media, _manifest(engine, prompt, weighted) | media.measures)


def _check_shape(engine: Engine, prompt: PromptSpec, image: Image.Image) -> Image.Image:
    """Return the image if the model accepts its shape, which for an image from the web is known only now."""
    if not engine.spec.sampled(prompt.sampling).control_images.take(image.size):
        message = f"the model does not accept a control image of {image.width}x{image.height} pixels"
        raise JobFailure(FailureCode.CONTROL_IMAGE_SHAPE, message)
    return image


def _with_multiplier(lora: LoraSpec, prompt: PromptSpec) -> LoraSpec:
    """Return the LoRA with the prompt's multiplier, if the prompt has one."""
    return lora if prompt.multiplier is None else lora.model_copy(update={"multiplier": prompt.multiplier})


def _use(engine: Engine, weighted: _Weighted) -> list[str]:
    return engine.use([(replace(file, expert=lora.transformer), lora.multiplier) for file, lora in weighted])


def _render(
    engine: Engine, weighted: _Weighted, prompt: PromptSpec, controls: list[Image.Image], observer: Observer
) -> Media:
    _use(engine, weighted)  # Costs nothing unless they were dropped for lack of memory.
    return engine.render(prompt, controls, observer)


def _manifest(engine: Engine, prompt: PromptSpec, weighted: _Weighted) -> dict[str, Any]:
    used = [
        {**lora.model_dump(exclude_none=True), "path": lora.path.public, "sha256": file.sha256}
        for file, lora in weighted
    ]
    parameters = {**prompt.model_dump(), "controls": tuple(bare(control) for control in prompt.controls)}
    return {**engine.describe(), "loras": used, "parameters": parameters}
