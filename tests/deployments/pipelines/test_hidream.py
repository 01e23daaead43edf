from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.pipelines.hidream import complete, complete_edit


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize(("complete", "shift"), [(complete, math.exp(1.15)), (complete_edit, 3.0)])
def test_the_schedule_is_shifted_twice(complete: Callable[[Any], None], shift: float, steps: int) -> None:
    pipeline = SimpleNamespace(tokenizer_4=SimpleNamespace(eos_token="<eos>", pad_token="<other>"))
    complete(pipeline)
    pipeline.scheduler.set_timesteps(steps, device="cpu")
    start = 0.99966645
    even = [start * (steps - step) / steps for step in range(steps)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    assert torch.allclose(pipeline.scheduler.sigmas, torch.tensor([*sigmas, 0.0]), atol=1e-6)
    assert pipeline.scheduler.timesteps.tolist() == [int(1000 * sigma) for sigma in sigmas]
    assert pipeline.tokenizer_4.pad_token == "<eos>"
