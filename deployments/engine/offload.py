"""Where a pipeline's weights are stored while they are not in use: on the device or in host memory."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.group_offloading import apply_group_offloading

from deployments.catalog.memory import encodes_text

OFFLOADS = ("none", "text", "model", "group", "sequential")
"""What moves to host memory:

- none: nothing;
- text: the text encoders, layer by layer, on a separate stream;
- model: every part, a whole part at a time;
- group: every part, layer by layer, on a separate stream;
- sequential: every part, layer by layer, without a separate stream.
"""


def place(pipeline: Any, device: torch.device, offload: str) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Move a loaded pipeline to `device`, or install hooks that move its parts there when they compute."""
    # The next layer is copied on a separate stream while one computes. Pin layers one by one
    # (`low_cpu_mem_usage`); else host memory would hold every weight twice.
    streamed = {"offload_type": "leaf_level", "use_stream": device.type == "cuda", "low_cpu_mem_usage": True}
    if offload == "none":
        # Parts that were loaded straight to the device stay; adjusting may have added modules on the host.
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
