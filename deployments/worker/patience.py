"""How long a job waits for a replica that holds its LoRA, learned from load times on this replica."""

from __future__ import annotations

import statistics
from collections import deque

_ASSUMED_LOAD_S = 0.5
"""Seconds assumed for a load until one is measured."""

_REMEMBERED_LOADS = 15
"""Number of recent loads that are remembered."""

_MIN_S, _MAX_S = 0.1, 10.0


class Patience:
    """The delay D of delay scheduling, in 0.1..10 s. One thread may write and any number may read.

    D is two load times: running a LoRA where it is not resident costs one load now, and another one later
    for the LoRA that it evicts. Waiting as long as the alternative costs, and then taking it, costs at most
    twice the optimum (the "ski rental" rule). The load time is the median of recent loads, so that one slow
    origin does not dominate.
    """

    def __init__(self) -> None:
        self._loads = deque([_ASSUMED_LOAD_S], maxlen=_REMEMBERED_LOADS)
        self.seconds = self._delay()

    def note(self, load_s: float) -> None:
        """Record that fetching a LoRA, reading it and moving it to the device took `load_s` seconds."""
        self._loads.append(load_s)
        self.seconds = self._delay()

    def _delay(self) -> float:
        # Rounded to tenths: one claim statement is built and cached per distinct value.
        return round(min(max(2 * statistics.median(self._loads), _MIN_S), _MAX_S), 1)
