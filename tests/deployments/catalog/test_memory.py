from __future__ import annotations

import pytest

from deployments.catalog import CATALOG
from deployments.catalog.memory import fastest_offload, needed_gib


@pytest.mark.parametrize("model", CATALOG)
def test_every_model_says_what_it_needs(model: str) -> None:
    spec = CATALOG[model]
    assert spec.memory_gib
    needed = needed_gib(spec)
    assert needed["none"] >= needed["model"] > 0
    assert needed["group"] == needed["sequential"] > 0


@pytest.mark.parametrize(
    ("model", "gib", "mode"),
    [
        ("flux", 80, "none"),
        ("flux", 24, "group"),
        ("flux2", 141, "none"),
        ("flux2", 80, "text"),
        ("flux2", 66, "model"),
        ("flux2", 40, "group"),
        ("qwen_image", 48, "text"),
        ("flux2", 4, None),
    ],
)
def test_the_fastest_mode_that_fits(model: str, gib: float, mode: str | None) -> None:
    assert fastest_offload(CATALOG[model], gib) == mode
