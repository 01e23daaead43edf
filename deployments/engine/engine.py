"""One warm pipeline: a prompt in, pixels out. The whole numeric path, usable without Ray.

Equal inputs give equal pictures: noise comes from a CPU generator that is made anew for each prompt, kernels
are deterministic, and the global random state is neither read nor changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from cluster.failures import FailureCode, JobFailure
from deployments.catalog import CATALOG, HighResolution, ModelSpec
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.classes import make_scheduler, with_parts_of
from deployments.engine.loading import Loader, be_deterministic
from deployments.engine.media import Media
from deployments.engine.offload import OFFLOADS, place
from deployments.engine.progress import Observer, Progress
from deployments.engine.tiling import tiled_decode
from deployments.engine.videos import Sound
from deployments.loras.adapters.compiled import Compiled
from deployments.loras.adapters.conversion import Converter, layers_of
from deployments.loras.adapters.device import Adapters
from deployments.loras.adapters.host import HostTier
from deployments.loras.sources.lora_root import LoraFile, digest
from deployments.settings import WorkerSettings
from deployments.spec.job import PromptSpec, Sampling

ADAPTER_BYTES = 8 * 2**30
"""Default room for adapters on the device, and for those in host memory: about 50 of rank 16 for FLUX.1."""


class Engine:
    """One model's pipeline on one device. For one thread only, but for `prepare` and `prepared`.

    `device` is "cpu" or "cuda"; `offload` (one of `OFFLOADS`) does nothing on the CPU; with `vae_tiling` what
    is larger than a tile is decoded in tiles; `adapter_bytes` and `host_adapter_bytes` bound the adapters on
    the device and those in host memory, of which those in use are never dropped. After `fuse_after` prompts
    in a row with the same LoRAs these are fused with the weights, whose layers take twice the memory of the
    device then. With `compiled` the blocks that the model repeats go through `torch.compile`, for the first
    prompt of each shape.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoints: Checkpoints,
        *,
        device: str,
        offload: str = "none",
        vae_tiling: bool = False,
        adapter_bytes: int = ADAPTER_BYTES,
        host_adapter_bytes: int = ADAPTER_BYTES,
        fuse_after: int | None = None,
        compiled: bool = False,
    ) -> None:
        if offload not in OFFLOADS:
            raise ValueError(f"offload is {offload!r}; it must be one of {', '.join(OFFLOADS)}")
        if (fuse_after or compiled) and offload != "none":
            raise ValueError("what is fused or compiled stays on the device: offload must be none")
        self.spec = spec
        self._device = torch.device(device)
        # The device's memory is the host's there.
        self._offload = "none" if device == "cpu" else offload
        self._loader = Loader(spec, checkpoints, self._device, to_device=self._offload == "none")
        self._checkpoints = checkpoints
        self._vae_tiling = vae_tiling
        self._adapter_bytes = adapter_bytes
        self._host_adapter_bytes = host_adapter_bytes
        self._fuse_after = fuse_after
        self._compile = compiled
        self._pipeline: Any = None
        self._image_pipeline: Any = None
        self._upsampler: Any = None
        self._host: HostTier | None = None
        self._adapters: Adapters | None = None

    @classmethod
    def of(cls, model: str, settings: WorkerSettings) -> Self:
        """Return the engine of a model id with these settings, not loaded yet."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            CATALOG[model],
            Checkpoints(settings.checkpoints, settings.model_cache),
            device=auto if settings.device == "auto" else settings.device,
            offload=settings.offload,
            vae_tiling=model in settings.vae_tiling,
            adapter_bytes=settings.adapter_bytes,
            host_adapter_bytes=settings.host_adapter_bytes,
            fuse_after=settings.fuse_after.get(model),
            compiled=model in settings.compile,
        )

    def load(self) -> None:
        """Load the pipeline to the device, every part in the compute dtype.

        Raises `JobFailure` (MODEL_LOAD_FAILED) for a checkpoint that cannot be had, and what diffusers raises
        for files that are not what they should be.
        """
        be_deterministic()
        pipeline = self._loader.pipeline()
        place(pipeline, self._device, self._offload)
        self._pipeline = self._image_pipeline = pipeline
        if self.spec.image_pipeline:
            self._image_pipeline = with_parts_of(pipeline, self.spec.image_pipeline)
            if self._offload == "model":
                # Who calls the parts sends the last one back to the host.
                place(self._image_pipeline, self._device, self._offload)
        for each in {self._pipeline, self._image_pipeline}:
            each.set_progress_bar_config(disable=True)
        layers = layers_of(pipeline)
        convert = Converter(layers, self.spec.experts, pinned=self._device.type == "cuda")
        self._host = HostTier(convert, self._host_adapter_bytes)
        self._adapters = Adapters(
            layers,
            self._host,
            self._device,
            self._adapter_bytes,
            fuse_after=self._fuse_after,
            compiled=Compiled(pipeline, layers) if self._compile else None,
        )

    def use(self, loras: Sequence[tuple[LoraFile, float]]) -> list[str]:
        """Make exactly these adapters active with these multipliers; returns warnings of partial matches.

        Raises `JobFailure`: LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, or LORA_NOT_FOUND for a file that went
        away. What was active stays so then.
        """
        return self._loaded_adapters.activate(loras)

    @contextmanager
    def prepare(self, file: LoraFile) -> Iterator[None]:
        """Bring the adapter of a file to host memory, where it stays at least until the block ends.

        From there it goes on to a GPU that has room for it; one on the device is left there. For other
        threads than the one that renders: a `use` of the same file meanwhile waits for this one instead of
        reading it too. Raises `JobFailure` as `use`; `RuntimeError` before `load`.
        """
        if self._host is None:
            raise RuntimeError("the engine is not loaded")
        if self._loaded_adapters.holds(file):
            yield
            return
        with self._host.use(file) as packed, self._loaded_adapters.staged(file, packed):
            yield

    def render(self, prompt: PromptSpec, controls: Sequence[Image.Image], observer: Observer) -> Media:
        """Render one prompt with the active adapters. Models without control images ignore `controls`.

        Raises `JobFailure` (OUTPUT_NOT_FINITE) where the numbers overflow.
        """
        pipeline = self._pipeline_for(controls)
        progress = Progress(observer)
        vae = pipeline.components.get("vae")
        tiled = tiled_decode(vae) if vae and self._vae_tiling else nullcontext()
        in_file_dtype = self.spec.sampled(prompt.sampling).products_in_file_dtype
        adapters = self._loaded_adapters.rendering(in_file_dtype=in_file_dtype)
        # From the arguments on: some hold what a text encoder says, which may have its LoRA too.
        with torch.inference_mode(), adapters, progress.of_pieces(vae), tiled:
            arguments = self._arguments(prompt, controls)
            with self._sampled(pipeline, prompt.sampling, arguments):
                if prompt.resolution == "High" and self.spec.high:
                    output = self._render_high(pipeline, self.spec.high, arguments, progress)
                else:
                    output = pipeline(**arguments, callback_on_step_end=progress.after_step, output_type="np")
        if self.spec.video is None:
            return Media(_to_bytes(output.images[0]))
        frames = np.stack([_to_bytes(frame) for frame in output.frames[0]])
        return Media(frames, fps=prompt.fps, sound=self._sound(output))

    @property
    def warm(self) -> frozenset[str]:
        """The sha256 of each adapter on the device."""
        return self._adapters.resident if self._adapters else frozenset()

    def drop_adapters(self) -> None:
        """Forget every adapter on the device, active ones too, and give it its memory back."""
        self._loaded_adapters.drop()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def probe(self) -> None:
        """Raise if the device no longer computes: a CUDA context stays broken after a kernel fault."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if torch.ones(1, device=self._device).add(1).item() != 2:
            raise RuntimeError("the device computes wrong results")

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says about model, software and device."""
        cuda = self._device.type == "cuda"
        return {
            "model": self.spec.id,
            **self._loader.origin(),
            "versions": {name: _version(name) for name in _PACKAGES},
            "device": torch.cuda.get_device_name(self._device) if cuda else self._device.type,
            "dtype": str(self._loader.dtype).removeprefix("torch."),
            "offload": self._offload,
            "vae_tiling": self._vae_tiling,
            "fused": self._loaded_adapters.fused,
            "compiled": self._compile,
        }

    def _render_high(
        self,
        pipeline: Any,  # noqa: ANN401 - any diffusers pipeline
        high: HighResolution,
        arguments: dict[str, Any],
        progress: Progress,
    ) -> Any:  # noqa: ANN401 - any pipeline's output
        if self._upsampler is None:
            self._upsampler = self._loader.part("upsampler", high.upsampler).to(self._device)
        path = self._checkpoints.locate_lora(high.lora)
        lora = LoraFile(path, digest(path), path.stat().st_size)
        refined = partial(self._loaded_adapters.joined_by, lora, high.multiplier)
        return high.render(pipeline, self._pipeline, arguments, self._upsampler, refined, progress)

    def _sound(self, output: Any) -> Sound | None:  # noqa: ANN401 - any pipeline's output
        rate = self.spec.video.sound_rate if self.spec.video else None
        if rate is None or output.audio is None:
            return None
        return Sound(_finite(output.audio[0].float().cpu().numpy()), rate)

    @property
    def _loaded_adapters(self) -> Adapters:
        if self._adapters is None:
            raise RuntimeError("the engine is not loaded")
        return self._adapters

    @contextmanager
    def _sampled(self, pipeline: Any, sampling: Sampling, arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
        """Change the pipeline for the time of a call, whose `arguments` may change as well."""
        row, own = self.spec.sampled(sampling), pipeline.scheduler
        if row.scheduler and row.scheduler is not self.spec.scheduler:
            pipeline.scheduler = make_scheduler(*row.scheduler)
        try:
            with row.during(pipeline, arguments) if row.during else nullcontext():
                yield
        finally:
            pipeline.scheduler = own

    def _pipeline_for(self, controls: Sequence[Image.Image]) -> Any:  # noqa: ANN401 - any diffusers pipeline
        return self._image_pipeline if controls else self._pipeline

    def _arguments(self, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:
        pipeline = self._pipeline_for(controls)
        row = self.spec.sampled(prompt.sampling)
        arguments: dict[str, Any] = {
            "prompt": prompt.prompt,
            "width": prompt.width,
            "height": prompt.height,
            "num_inference_steps": prompt.steps,
            row.guidance_argument: prompt.guidance,
            "generator": torch.Generator("cpu").manual_seed(prompt.seed),
            **row.call_options,
        }
        if row.negative_prompt and "negative_prompt" in inspect.signature(pipeline).parameters:
            # Always a string: to the SD pipelines, none at all means another embedding than an empty one.
            arguments["negative_prompt"] = prompt.neg
        if row.video and prompt.num_frames:
            arguments["num_frames"] = row.video.floor(prompt.num_frames)
        if row.arguments:
            arguments |= row.arguments(pipeline, prompt, controls)
        return arguments


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Return a picture of 0..1 as uint8, rounded; raises `JobFailure` for one that is no numbers."""
    return (_finite(values) * 255).round().astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        message = "the output came out as infinite or no numbers: the LoRA is too strong for the model"
        raise JobFailure(FailureCode.OUTPUT_NOT_FINITE, message)
    return values


_PACKAGES = ("lora-serve", "torch", "diffusers", "transformers")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
