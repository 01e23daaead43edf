"""How long jobs wait for a warm replica: learned, bounded, and robust against one slow load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.worker.patience import Patience


def test_it_follows_what_loads_cost() -> None:
    patience = Patience()
    for _ in range(20):
        patience.note(0.4)
    assert patience.seconds == pytest.approx(0.8)
    for _ in range(20):
        patience.note(2.0)
    assert patience.seconds == pytest.approx(4.0)


def test_one_slow_origin_says_little() -> None:
    patience = Patience()
    for seconds in (0.3, 0.3, 600.0, 0.3):
        patience.note(seconds)
    assert patience.seconds == pytest.approx(0.6)


@given(st.lists(st.floats(0, 1e6), max_size=30))
def test_it_is_bounded_and_has_few_values(loads: list[float]) -> None:
    patience = Patience()
    for seconds in loads:
        patience.note(seconds)
    assert 0.1 <= patience.seconds <= 10
    assert patience.seconds == round(patience.seconds, 1)
