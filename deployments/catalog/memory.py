"""GPU memory that models need, computed from the sizes in the catalogue. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.catalog import ModelSpec

CONTEXT_GIB = 1.0
"""Approximate memory for CUDA and its libraries."""

LAYERS_GIB = 2.0
"""Room for streamed layers: at most two are on the device at a time, embeddings included."""


def needed_gib(spec: ModelSpec) -> Mapping[str, float]:
    """Return the GiB of device memory that each offload mode needs, fastest mode first.

    For parts in bfloat16 and the model's default size, without adapters: one of rank 16 needs 20 to 300 MiB.
    """
    room = CONTEXT_GIB + spec.activations_gib
    return {
        "none": room + sum(spec.memory_gib.values()),
        "text": room
        + LAYERS_GIB
        + sum(gib for part, gib in spec.memory_gib.items() if not encodes_text(part)),
        "model": room + max(spec.memory_gib.values()),
        "group": room + LAYERS_GIB,
        "sequential": room + LAYERS_GIB,
    }


def fastest_offload(spec: ModelSpec, gpu_gib: float) -> str | None:
    """Return the fastest offload mode that fits on a GPU with this much memory, or None."""
    return next((mode for mode, gib in needed_gib(spec).items() if gib <= gpu_gib), None)


def encodes_text(part: str) -> bool:
    """Return whether this part only encodes the prompt, and is idle until the next one."""
    return part.startswith("text_encoder") or part == "mllm"
