from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from deployments.pipelines import qwen_image

SIDE = 256


@pytest.fixture
def small_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink Qwen-Image's control images to a 16th of a megapixel, for tests that hold at any size."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        monkeypatch.setattr(module, "calculate_dimensions", smaller(module.calculate_dimensions))
    monkeypatch.setattr(qwen_image, "_MEGAPIXEL", SIDE * SIDE)


def smaller(own: Callable[[int, float], tuple[int, ...]]) -> Callable[[int, float], tuple[int, ...]]:
    return lambda area, ratio: own(min(area, SIDE * SIDE), ratio)
