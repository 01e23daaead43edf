"""What fits on a GPU, and how: arithmetic on the sizes in the catalogue. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.catalog import ModelSpec

CONTEXT_GIB = 1.0
"""What CUDA and its libraries take for themselves, about."""

LAYERS_GIB = 2.0
"""Room for the layers that are on the device when parts are streamed: at most two, embeddings among them."""


def needed_gib(spec: ModelSpec) -> Mapping[str, float]:
    """Return the GiB of device memory that each offload mode needs, fastest mode first.

    Parts in bfloat16 at the model's default size, with no adapters: one of rank 16 takes 20 to 300 MiB more.
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
    """Return the fastest offload mode that a GPU with this much memory has room for, or None."""
    return next((mode for mode, gib in needed_gib(spec).items() if gib <= gpu_gib), None)


def encodes_text(part: str) -> bool:
    """Whether the part of this name reads the prompt, and then waits until the next one."""
    return part.startswith("text_encoder") or part == "mllm"
