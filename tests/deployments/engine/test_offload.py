"""Offloading: parts move to the device when they compute. Here the device is the CPU, with the same hooks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from deployments.engine.offload import place
from tests.support.studio import Studio

Get = Callable[..., Studio]


@pytest.mark.parametrize(
    ("model", "offload"), [("flux", "text"), ("omnigen2", "text"), ("flux", "model"), ("flux", "group")]
)
def test_the_picture_stays_the_same(new_studio: Get, studio: Get, model: str, offload: str) -> None:
    """Adapter hooks and offload hooks work together, also for a second prompt."""
    waiting = new_studio(model)
    place(waiting.engine._pipeline, torch.device("cpu"), offload)
    loras = {waiting.names[0]: 0.7}
    expected = studio(model).render(loras)
    assert np.array_equal(waiting.render(loras), expected)
    assert np.array_equal(waiting.render(loras), expected)


def test_text_encoders_alone_are_streamed(new_studio: Get) -> None:
    pipeline = new_studio("flux").engine._pipeline
    place(pipeline, torch.device("cpu"), "text")
    hooked = {
        name: any(hasattr(layer, "_diffusers_hook") for layer in part.modules())
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert hooked == {"text_encoder": True, "text_encoder_2": True, "transformer": False, "vae": False}


def test_both_pipelines_of_an_id_send_parts_back(new_studio: Get) -> None:
    """After either pipeline was called, every part has its offload hook again."""
    used = new_studio("wan22_5b")
    pipelines = used.engine._pipeline, used.engine._image_pipeline
    for pipeline in pipelines:
        place(pipeline, torch.device("cpu"), "model")
    for pipeline in pipelines * 2:
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        pipeline.maybe_free_model_hooks()
        assert len(pipeline._all_hooks) == len(parts) > 2
        assert all(hasattr(part, "_hf_hook") for part in parts)
