"""One warm pipeline: a prompt in, pixels out. The whole numeric path, usable without Ray.

Equal inputs give equal pictures: noise comes from a CPU generator that is made anew for each prompt, kernels
are deterministic, and the global random state is neither read nor changed.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from cluster.jobs import FailureCode, JobFailure
from deployments.catalog import HighResolution, ModelSpec, Part
from deployments.checkpoints import Checkpoints, Located
from deployments.classes import make_scheduler, named, pipeline_class, with_parts_of
from deployments.loras.adapters import Adapters
from deployments.loras.compiled import Compiled
from deployments.loras.conversion import Converter, layers_of
from deployments.loras.host import HostTier
from deployments.loras.references import LoraFile, digest
from deployments.media import Media
from deployments.progress import Observer, Progress
from deployments.render import PromptSpec, Sampling
from deployments.videos import Sound

ADAPTER_BYTES = 8 * 2**30
"""Default room for adapters on the device, and for those in host memory: about 50 of rank 16 for FLUX.1."""

OFFLOADS = ("none", "model", "group", "sequential")


class Engine:
    """One model's pipeline on one device. For one thread only, but for `prepare` and `prepared`.

    `device` is "cpu" or "cuda"; `offload` is diffusers' own (one of `OFFLOADS`) and does nothing on the CPU;
    `adapter_bytes` and `host_adapter_bytes` bound the adapters on the device and those in host memory, of
    which those in use are never dropped. After `fuse_after` prompts in a row with the same LoRAs these are
    fused with the weights; those of a LoRA's layers take twice the memory of the device then. With `compiled`
    the blocks that the model repeats go through `torch.compile`, for the first prompt of each shape.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoints: Checkpoints,
        *,
        device: str,
        offload: str = "none",
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
        self._checkpoints = checkpoints
        self._device = torch.device(device)
        self._offload = offload
        self._adapter_bytes = adapter_bytes
        self._host_adapter_bytes = host_adapter_bytes
        self._fuse_after = fuse_after
        self._compile = compiled
        self._pipeline: Any = None
        self._image_pipeline: Any = None
        self._located: Located | None = None
        self._parts: dict[str, str] = {}
        self._upsampler: Any = None
        self._host: HostTier | None = None
        self._adapters: Adapters | None = None

    def load(self) -> None:
        """Load the pipeline to the device, every part in the compute dtype.

        Raises `JobFailure` (MODEL_LOAD_FAILED) for a checkpoint that cannot be had, and what diffusers raises
        for files that are not what they should be.
        """
        _be_deterministic()
        diffusers.utils.logging.disable_progress_bar()
        # Their warnings quote prompts.
        logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        # Transformers initialises some parts at random before it reads their weights.
        with torch.random.fork_rng(devices=[]):
            pipeline = self._load_pipeline()
        if self.spec.scheduler:
            # Not through the constructor: the one of Stable Diffusion 1.5 changes `steps_offset` 0 to 1.
            pipeline.scheduler = make_scheduler(*self.spec.scheduler)
        if self.spec.adjust:
            self._family_function(self.spec.adjust)(pipeline)
        self._place(pipeline)
        self._pipeline = self._image_pipeline = pipeline
        if self.spec.image_pipeline:
            self._image_pipeline = with_parts_of(pipeline, self.spec.image_pipeline)
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

    @property
    def prepared(self) -> frozenset[str]:
        """The sha256 of each adapter in host memory; from any thread."""
        return self._host.hashes if self._host else frozenset()

    def render(self, prompt: PromptSpec, controls: Sequence[Image.Image], observer: Observer) -> Media:
        """Render one prompt with the active adapters. Models without control images ignore `controls`.

        Raises `JobFailure` (OUTPUT_NOT_FINITE) where the numbers overflow.
        """
        pipeline = self._pipeline_for(controls)
        progress = Progress(observer)
        with torch.inference_mode(), progress.of_pieces(pipeline.components.get("vae")):
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
            "checkpoint": self.spec.checkpoint.repo,
            "revision": self._located.revision if self._located else None,
            "parts": dict(self._parts),
            "versions": {name: _version(name) for name in _PACKAGES},
            "device": torch.cuda.get_device_name(self._device) if cuda else self._device.type,
            "dtype": str(self._dtype).removeprefix("torch."),
            "offload": self._offload,
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
            self._upsampler = self._load_part("upsampler", high.upsampler).to(self._device)
        path = self._checkpoints.locate_lora(high.lora)
        lora = LoraFile(path, digest(path), path.stat().st_size)
        refined = partial(self._loaded_adapters.joined_by, lora, high.multiplier)
        render = self._family_function(high.render)
        return render(pipeline, self._pipeline, arguments, self._upsampler, refined, progress)

    def _sound(self, output: Any) -> Sound | None:  # noqa: ANN401 - any pipeline's output
        rate = self.spec.video.sound_rate if self.spec.video else None
        return Sound(_finite(output.audio[0].float().cpu().numpy()), rate) if rate else None

    @property
    def _dtype(self) -> torch.dtype:
        """As the reference: bfloat16 where the GPU has it, else float16; float32 on the CPU."""
        if self._device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    @property
    def _loaded_adapters(self) -> Adapters:
        if self._adapters is None:
            raise RuntimeError("the engine is not loaded")
        return self._adapters

    def _load_pipeline(self) -> Any:  # noqa: ANN401 - any diffusers pipeline
        options, own_class = self.spec.load_options, pipeline_class(self.spec.pipeline)
        parts = {name: self._load_part(name, part) for name, part in self.spec.parts.items()}
        if self.spec.assembled:
            return own_class(**parts, scheduler=None, **options)
        absent = [name for name, value in options.items() if value is None]
        self._located = self._checkpoints.locate(self.spec.checkpoint, without=[*absent, *parts])
        pipeline = own_class.from_pretrained(
            self._located.directory,
            variant=self._located.variant,
            dtype=self._dtype,
            use_safetensors=True,
            local_files_only=True,
            **self._loading,
            **options,
            # It refuses a plain tokenizer in a processor's place; that comes afterwards.
            **{name: part if isinstance(part, torch.nn.Module) else None for name, part in parts.items()},
        )
        pipeline.register_modules(**parts)
        return pipeline

    def _load_part(self, name: str, part: Part) -> Any:  # noqa: ANN401 - a model or a tokenizer
        located = self._checkpoints.locate_part(part)
        self._parts[name] = f"{part.checkpoint.repo}@{located.revision}"
        part_class = named(part.class_name)
        is_model = issubclass(part_class, torch.nn.Module)
        options = {"dtype": self._dtype, "use_safetensors": True, **self._loading} if is_model else {}
        return part_class.from_pretrained(located.directory, local_files_only=True, **options)

    @property
    def _stays(self) -> bool:
        """Whether every part lives on the device."""
        return self._device.type == "cpu" or self._offload == "none"

    @property
    def _loading(self) -> dict[str, str]:
        """Where weights are read to: straight to the device, with no copy in host memory before."""
        return {"device_map": self._device.type} if self._stays else {}

    def _place(self, pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
        if self._stays:
            # What is here already stays; an adjusted pipeline may hold more than was loaded.
            pipeline.to(self._device)
        elif self._offload == "model":
            pipeline.enable_model_cpu_offload(device=self._device)
        elif self._offload == "group":
            # The next layer comes on a stream of its own while one computes; pinned as it goes, or host
            # memory would hold every weight twice.
            pipeline.enable_group_offload(
                self._device, offload_type="leaf_level", use_stream=True, low_cpu_mem_usage=True
            )
        else:
            pipeline.enable_sequential_cpu_offload(device=self._device)

    @contextmanager
    def _sampled(self, pipeline: Any, sampling: Sampling, arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
        """Change the pipeline for the time of a call, whose `arguments` may change as well."""
        row, own = self.spec.sampled(sampling), pipeline.scheduler
        if row.scheduler and row.scheduler is not self.spec.scheduler:
            pipeline.scheduler = make_scheduler(*row.scheduler)
        try:
            during = self._family_function(row.during)(pipeline, arguments) if row.during else nullcontext()
            in_file_dtype = row.products_in_file_dtype
            with self._loaded_adapters.rendering(in_file_dtype=in_file_dtype), during:
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
            arguments |= self._family_function(row.arguments)(pipeline, prompt, controls)
        return arguments

    def _family_function(self, name: str) -> Callable[..., Any]:
        return named(f"deployments.pipelines.{name if '.' in name else f'{self.spec.family}.{name}'}")


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


def _be_deterministic() -> None:
    """Choose kernels that give the same bits each time. The workspace is read when cuBLAS starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
