"""One warm pipeline that turns prompts into pixels: the whole numeric path. Needs no Ray.

Equal inputs give equal pictures: each prompt gets a new CPU generator for its noise, kernels are
deterministic, and the global random state is neither read nor changed.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
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
from deployments.engine.versions import package_versions
from deployments.engine.videos import Sound
from deployments.loras.adapters.active_adapters import Adapters
from deployments.loras.adapters.compiled import Compiled
from deployments.loras.adapters.conversion import Converter, layers_of
from deployments.loras.adapters.host_tier import HostTier
from deployments.loras.sources.lora_file import LoraFile, digest
from deployments.settings import WorkerSettings
from deployments.spec.job import PromptSpec, Sampling

ADAPTER_BYTES = 8 * 2**30
"""Default limit of adapters on the device, and of those in host memory: about 50 of rank 16 for FLUX.1."""


class Engine:
    """One model's pipeline on one device. Use it from one thread; only `prepare` is for other threads.

    - `device` is "cpu" or "cuda".
    - `offload` is one of `OFFLOADS` and has no effect on the CPU.
    - `vae_tiling` decodes pictures larger than a tile in tiles.
    - `adapter_bytes` and `host_adapter_bytes` limit the adapters on the device and in host memory.
      Adapters in use are never dropped.
    - After `fuse_after` consecutive prompts with the same LoRAs, these are fused into the weights. The fused
      layers then take twice the device memory.
    - `compiled` runs the model's repeated blocks through `torch.compile`, which compiles at the first
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
            raise ValueError("fused or compiled weights must stay on the device: offload must be none")
        self.spec = spec
        self._device = torch.device(device)
        # On the CPU there is nothing to offload: device memory is host memory.
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
        """Return the engine of a model id with these settings. It is not loaded yet."""
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

        Raises `JobFailure` (MODEL_LOAD_FAILED) if a checkpoint is unavailable, and whatever diffusers raises
        for unexpected files.
        """
        be_deterministic()
        pipeline = self._loader.pipeline()
        place(pipeline, self._device, self._offload)
        self._pipeline = self._image_pipeline = pipeline
        if self.spec.image_pipeline:
            self._image_pipeline = with_parts_of(pipeline, self.spec.image_pipeline)
            if self._offload == "model":
                # The pipeline that runs moves its last part back to the host, so it needs hooks too.
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
        """Make exactly these adapters active with these multipliers. Return warnings about partial matches.

        Raises `JobFailure`: LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, or LORA_NOT_FOUND for a file that has
        disappeared. After a failure the previous adapters stay active.
        """
        return self._loaded_adapters.activate(loras)

    @contextmanager
    def prepare(self, file: LoraFile) -> Iterator[None]:
        """Preload a file's adapter into host memory, where it stays at least until the block ends.

        If the GPU has room, the adapter is copied there too; one already on the device stays there. Call this
        from threads other than the rendering one. A concurrent `use` of the same file waits for this call
        instead of reading the file again. Raises `JobFailure` as `use` does; `RuntimeError` before `load`.
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

        Raises `JobFailure` (OUTPUT_NOT_FINITE) if the output contains infinite or NaN values.
        """
        pipeline = self._pipeline_for(controls)
        progress = Progress(observer)
        vae = pipeline.components.get("vae")
        tiled = tiled_decode(vae) if vae and self._vae_tiling else nullcontext()
        in_file_dtype = self.spec.sampled(prompt.sampling).products_in_file_dtype
        adapters = self._loaded_adapters.rendering(in_file_dtype=in_file_dtype)
        # The arguments may include text embeddings, and the text encoder may have a LoRA too.
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
        """Drop every adapter on the device, including active ones, and free their memory."""
        self._loaded_adapters.drop()
        self.free_memory()

    def free_memory(self) -> None:
        """Collect what failed work left in reference cycles, and return unused memory to the device."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def probe(self) -> None:
        """Raise if the device no longer computes. A CUDA context stays broken after a kernel fault."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if torch.ones(1, device=self._device).add(1).item() != 2:
            raise RuntimeError("the device computes wrong results")

    def describe(self) -> dict[str, Any]:
        """Return the manifest entries about model, software and device."""
        cuda = self._device.type == "cuda"
        return {
            "model": self.spec.id,
            **self._loader.origin(),
            "versions": package_versions(),
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
        """Change the pipeline for one call according to `sampling`. May change `arguments` too."""
        row, original = self.spec.sampled(sampling), pipeline.scheduler
        if row.scheduler and row.scheduler is not self.spec.scheduler:
            pipeline.scheduler = make_scheduler(*row.scheduler)
        try:
            with row.during(pipeline, arguments) if row.during else nullcontext():
                yield
        finally:
            pipeline.scheduler = original

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
            # Always a string: for None, SD pipelines use another embedding than for an empty string.
            arguments["negative_prompt"] = prompt.neg
        if row.video and prompt.num_frames:
            arguments["num_frames"] = row.video.floor(prompt.num_frames)
        if row.arguments:
            arguments |= row.arguments(pipeline, prompt, controls)
        return arguments


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Return a picture in 0..1 as rounded uint8. Raises `JobFailure` for infinite or NaN values."""
    return (_finite(values) * 255).round().astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        message = "the output contains infinite or NaN values: the LoRA is too strong for the model"
        raise JobFailure(FailureCode.OUTPUT_NOT_FINITE, message)
    return values
