"""How long a job waits for a replica that holds its LoRA, learned from what loads cost on this replica."""

from __future__ import annotations

import statistics
from collections import deque

_FIRST_LOAD_S = 0.5
"""What a load counts until one was measured."""

_LOADS = 15
"""How many loads are remembered."""

_SHORTEST_S, _LONGEST_S = 0.1, 10.0


class Patience:
    """The delay D of delay scheduling, in 0.1..10 s; for one thread that writes and any that read.

    Two loads: to run a LoRA where it is not resident costs one load now, and one more later, of the LoRA that
    made room. Who waits as long as the alternative costs, and then takes it, pays at most twice the best that
    hindsight could do (the "ski rental" rule). A load is the median of the last: one slow origin says little
    of the next.
    """

    def __init__(self) -> None:
        self._loads = deque([_FIRST_LOAD_S], maxlen=_LOADS)
        self.seconds = self._learned()

    def note(self, load_s: float) -> None:
        """Remember that a LoRA took `load_s` seconds to be fetched, read and brought to the device."""
        self._loads.append(load_s)
        self.seconds = self._learned()

    def _learned(self) -> float:
        # In tenths: the statement of a claim is built once for each value.
        return round(min(max(2 * statistics.median(self._loads), _SHORTEST_S), _LONGEST_S), 1)
