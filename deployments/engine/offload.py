"""Where the weights of a pipeline are while they wait: on the device, or in host memory."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.group_offloading import apply_group_offloading

from deployments.catalog.memory import encodes_text

OFFLOADS = ("none", "text", "model", "group", "sequential")
"""Text encoders only, a layer at a time; a whole part at a time; every part a layer at a time, on a stream of
its own or not."""


def place(pipeline: Any, device: torch.device, offload: str) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Bring a loaded pipeline to `device`, or let its parts come there when they compute."""
    # The next layer comes on a stream of its own while one computes; pinned as it goes, or host memory would
    # hold every weight twice.
    streamed = {"offload_type": "leaf_level", "use_stream": device.type == "cuda", "low_cpu_mem_usage": True}
    if offload == "none":
        # What is there already stays; an adjusted pipeline may hold more than was loaded.
        pipeline.to(device)
    elif offload == "text":
        for name, part in pipeline.components.items():
            if encodes_text(name):
                apply_group_offloading(part, device, **streamed)
            elif isinstance(part, torch.nn.Module):
                part.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipeline.enable_group_offload(device, **streamed)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
