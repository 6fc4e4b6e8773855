"""A run's time: no workload begins when it is up, and further rounds only while there is time left for all."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """`seconds` (None = no limit) shared out evenly over `parts`; time that one part leaves over goes to the next."""

    def __init__(self, seconds: float | None, parts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._parts = max(parts, 1)
        self._part = 0
        self._clock = clock
        self._began = clock()

    def next_part(self) -> None:
        """The next part begins."""
        self._part += 1

    @property
    def spent(self) -> bool:
        """Whether nothing new may begin."""
        return self._seconds is not None and self._clock() - self._began >= self._seconds

    def allows_another(self, round_seconds: float) -> bool:
        """Whether the current part has time for one more round, if it takes as long as the last one did."""
        if self._seconds is None:
            return True
        share = self._seconds * min(self._part / self._parts, 1.0)
        return self._clock() - self._began + round_seconds <= share
