"""What stays float32 where the models run in bfloat16, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deployments.engine import Engine
from tests.studio import Studio

NewStudio = Callable[[str], Studio]


@pytest.fixture
def in_bfloat16(new_studio: NewStudio, monkeypatch: pytest.MonkeyPatch) -> NewStudio:
    monkeypatch.setattr(Engine, "_dtype", torch.bfloat16)
    return new_studio


@pytest.mark.parametrize(
    "model",
    [
        "zimage_deturbo",
        "qwen_image",
        "qwen_image_edit_plus",
        "lumina2",
        "krea2",
        "krea2_o_edit",
        "hidream",
        "hidream_e1",
        "hidream_o1",
        "omnigen2",
    ],
)
def test_rotary_frequencies(in_bfloat16: NewStudio, model: str) -> None:
    """Rounded, they would bend the positions: by a radian at the 500th."""
    parts = in_bfloat16(model).engine._pipeline.components.values()
    models = [part for part in parts if isinstance(part, torch.nn.Module)]
    frequencies = [
        buffer for part in models for name, buffer in part.named_buffers() if name.endswith("inv_freq")
    ]
    assert frequencies
    assert {buffer.dtype for buffer in frequencies} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for part in models for parameter in part.parameters()}


def test_the_latents_of_krea_2(in_bfloat16: NewStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    used = in_bfloat16("krea2")
    pipeline, seen = used.engine._pipeline, []
    step = pipeline.scheduler.step

    def watch(
        prediction: torch.Tensor, time: torch.Tensor, latents: torch.Tensor, **options: object
    ) -> object:
        seen.append((prediction.dtype, latents.dtype, torch.equal(latents, latents.bfloat16().float())))
        return step(prediction, time, latents, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", watch)
    used.picture(steps=2)
    assert seen == [(torch.float32, torch.float32, False)] * 2
