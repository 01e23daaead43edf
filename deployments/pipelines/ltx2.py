"""LTX-2: its schedule, first frame and timing, and how the trainer's previews differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from deployments.pipelines import wan
from deployments.spec.job import PromptSpec

_MASK_THRESHOLD = -9000.0
"""Mask values at or above this mark tokens of the prompt; the connectors use the same threshold."""


def keep_the_shift(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Shift the schedule alike at every size, as in LTX-2's first release. diffusers changed that later."""
    config = pipeline.scheduler.config
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, base_shift=config.max_shift)


def arguments(pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for image and timing: the rate scales positions, `num_frames` sets the sound's length."""
    timing = {"num_frames": prompt.num_frames, "frame_rate": float(prompt.fps or 0)}
    return preview_arguments(pipeline, prompt, controls) | timing


def preview_arguments(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    controls: Sequence[Image.Image],
) -> dict[str, Any]:
    """Arguments for the control image, if there is one: stretched, and not compressed again."""
    return wan.image_arguments(pipeline, prompt, controls) | ({"image_crf": 0} if controls else {})


@contextmanager
def reversed_text(pipeline: Any, _arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Let the connectors see the prompt's tokens, and the registers after them, in reverse order.

    The trainer's version of diffusers does so (diffusers issue 13930), also during training.
    """
    with ExitStack() as hooks:
        for connector in (pipeline.connectors.video_connector, pipeline.connectors.audio_connector):
            reversal = _Reversal(connector)
            first = connector.transformer_blocks[0]
            hooks.callback(connector.register_forward_pre_hook(reversal.flip_tokens).remove)
            hooks.callback(first.register_forward_pre_hook(reversal.flip_registers).remove)
        yield


class _Reversal:
    """Hooks of one connector.

    The registers are flipped in a block: with offloading, only there are they sure to be on the device.
    """

    def __init__(self, connector: Any) -> None:  # noqa: ANN401 - no public class
        self._connector = connector

    def flip_tokens(self, _connector: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        hidden, mask = inputs
        self._tokens = (mask >= _MASK_THRESHOLD).flatten(1).sum(dim=1, keepdim=True)
        return hidden.flip(1), mask.flip(-1)

    def flip_registers(self, _block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        registers, length = self._connector.learnable_registers, hidden.shape[1]
        padding = registers.flip(0).repeat(length // len(registers), 1).to(hidden.dtype)
        is_token = torch.arange(length, device=hidden.device) < self._tokens
        return torch.where(is_token[:, :, None], hidden, padding), *others
