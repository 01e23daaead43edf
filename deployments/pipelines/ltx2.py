"""LTX-2: its schedule, its first frame and its timing, and how the trainer's previews differ."""

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

_MASKED = -9000.0
"""At or above, a token counts as one of the prompt: what the connectors compare their mask with."""


def keep_the_shift(pipeline: Any) -> None:  # noqa: ANN401 - any diffusers pipeline
    """Shift the schedule alike at every size, as LTX-2 was first released; diffusers has changed that."""
    config = pipeline.scheduler.config
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, base_shift=config.max_shift)


def arguments(pipeline: Any, prompt: PromptSpec, controls: Sequence[Image.Image]) -> dict[str, Any]:  # noqa: ANN401
    """Arguments for image and timing: the rate moves positions; sound is as long as the frames asked for."""
    timing = {"num_frames": prompt.num_frames, "frame_rate": float(prompt.fps or 0)}
    return preview_arguments(pipeline, prompt, controls) | timing


def preview_arguments(
    pipeline: Any,  # noqa: ANN401
    prompt: PromptSpec,
    controls: Sequence[Image.Image],
) -> dict[str, Any]:
    """Arguments for the control image, if there is one: stretched, and not compressed once more."""
    return wan.image_arguments(pipeline, prompt, controls) | ({"image_crf": 0} if controls else {})


@contextmanager
def reversed_text(pipeline: Any, _arguments: dict[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Let the connectors see the prompt's tokens, and the registers after them, in reverse order.

    So did the diffusers that the trainer has (its issue 13930), in training too.
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

    Only in the blocks are the registers sure to be on the device, whatever offloading there is.
    """

    def __init__(self, connector: Any) -> None:  # noqa: ANN401 - no public class
        self._connector = connector

    def flip_tokens(self, _connector: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        hidden, mask = inputs
        self._tokens = (mask >= _MASKED).flatten(1).sum(dim=1, keepdim=True)
        return hidden.flip(1), mask.flip(-1)

    def flip_registers(self, _block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        registers, length = self._connector.learnable_registers, hidden.shape[1]
        behind = registers.flip(0).repeat(length // len(registers), 1).to(hidden.dtype)
        is_token = torch.arange(length, device=hidden.device) < self._tokens
        return torch.where(is_token[:, :, None], hidden, behind), *others
