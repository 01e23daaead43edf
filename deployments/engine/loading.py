"""Loads the pipeline of a catalogue row: each part's files, dtype and device."""

from __future__ import annotations

import logging
import os
from typing import Any

import diffusers
import torch
import transformers

from deployments.catalog import ModelSpec, Part
from deployments.engine.checkpoints import Checkpoints, Located
from deployments.engine.classes import load_class, make_scheduler


class Loader:
    """Loads the parts that a row names, each in the compute dtype.

    With `to_device`, weights are read straight to the device, without a copy in host memory first.
    """

    def __init__(
        self, spec: ModelSpec, checkpoints: Checkpoints, device: torch.device, *, to_device: bool
    ) -> None:
        self._spec = spec
        self._checkpoints = checkpoints
        self._device = device
        self._options = {"device_map": device.type} if to_device else {}
        self._located: Located | None = None
        self._parts: dict[str, str] = {}

    @property
    def dtype(self) -> torch.dtype:
        """As in the reference: bfloat16 if the GPU supports it, else float16; float32 on the CPU."""
        if self._device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def pipeline(self) -> Any:  # noqa: ANN401 - any diffusers pipeline
        """Load the pipeline, adjusted as its row says.

        Raises `JobFailure` (MODEL_LOAD_FAILED) if a checkpoint is unavailable, and whatever diffusers raises
        for unexpected files.
        """
        diffusers.utils.logging.disable_progress_bar()
        # The warnings of these modules quote prompts.
        logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        # Transformers initialises some parts at random before it reads their weights.
        with torch.random.fork_rng(devices=[]):
            pipeline = self._assemble()
        if self._spec.scheduler:
            # Not through the constructor: the one of Stable Diffusion 1.5 changes `steps_offset` 0 to 1.
            pipeline.scheduler = make_scheduler(*self._spec.scheduler)
        if self._spec.adjust:
            self._spec.adjust(pipeline)
        return pipeline

    def part(self, name: str, part: Part) -> Any:  # noqa: ANN401 - a model or a tokenizer
        """Load a single part. Raises the same errors as `pipeline`."""
        located = self._checkpoints.locate_part(part)
        self._parts[name] = f"{part.checkpoint.repo}@{located.revision}"
        part_class = load_class(part.class_name)
        is_model = issubclass(part_class, torch.nn.Module)
        options = {"dtype": self.dtype, "use_safetensors": True, **self._options} if is_model else {}
        return part_class.from_pretrained(located.directory, local_files_only=True, **options)

    def origin(self) -> dict[str, Any]:
        """Return the manifest entries that say where the weights came from."""
        return {
            "checkpoint": self._spec.checkpoint.repo,
            "revision": self._located.revision if self._located else None,
            "parts": dict(self._parts),
        }

    def _assemble(self) -> Any:  # noqa: ANN401 - any diffusers pipeline
        spec, pipeline_class = self._spec, load_class(self._spec.pipeline)
        parts = {name: self.part(name, part) for name, part in spec.parts.items()}
        if spec.assembled:
            return pipeline_class(**parts, scheduler=None, **spec.load_options)
        absent = [name for name, value in spec.load_options.items() if value is None]
        self._located = self._checkpoints.locate(spec.checkpoint, without=[*absent, *parts])
        pipeline = pipeline_class.from_pretrained(
            self._located.directory,
            variant=self._located.variant,
            dtype=self.dtype,
            use_safetensors=True,
            local_files_only=True,
            **self._options,
            **spec.load_options,
            # `from_pretrained` refuses a plain tokenizer for a processor; `register_modules` adds it below.
            **{name: part if isinstance(part, torch.nn.Module) else None for name, part in parts.items()},
        )
        pipeline.register_modules(**parts)
        return pipeline


def be_deterministic() -> None:
    """Choose kernels that give the same bits each time. cuBLAS reads the variable when it starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise torch fills every `torch.empty` with NaN, which only finds reads of uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
