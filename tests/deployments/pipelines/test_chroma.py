from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deployments.pipelines.chroma import _encode
from tests.support.studio import Studio


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [(8, range(9)), (260, range(261)), (257, range(257)), (259, [*range(259), 260]), (512, range(512))],
)
def test_previews_count_tokens_in_bfloat16(
    studio: Callable[[str], Studio], tokens: int, seen: range | list[int]
) -> None:
    """bfloat16 has no odd numbers above 256, so the padding token moves or is missing."""
    text = "a " * (tokens - 1)
    _, mask = _encode(studio("chroma").engine._pipeline, text, torch.bfloat16)
    assert mask.dtype == torch.bool
    assert mask[0].nonzero()[:, 0].tolist() == list(seen)
