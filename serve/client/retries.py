"""When a refused call is tried again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from serve.client.wire import Call
from serve.errors import QueueFull, ServeError, Unavailable

_FIRST_DELAY_SECONDS = 0.25  # doubled at each try
_MAX_DELAY_SECONDS = 10.0  # also of a Retry-After: who wants to wait longer sets more tries


@dataclass(frozen=True, slots=True)
class Retries:
    """Tries a call again when the server had no room (QueueFull) or was not there (Unavailable).

    Generating changes nothing on the server, so another try is always safe.
    """

    max_retries: int

    def delay_seconds(self, error: ServeError, retries_made: int, call: Call) -> float | None:
        """How long to wait before another try; None = give up, because of the error, the tries or the deadline."""
        if not isinstance(error, QueueFull | Unavailable) or retries_made >= self.max_retries:
            return None
        asked = error.retry_after_seconds
        delay = _FIRST_DELAY_SECONDS * 2.0**retries_made if asked is None else asked
        delay = min(delay, _MAX_DELAY_SECONDS) * random.uniform(1.0, 1.25)  # not all clients at the same moment
        if call.expires is not None and time.monotonic() + delay >= call.expires:
            return None
        return delay
