"""When a refused call is tried again."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from serve.client.wire import Call
from serve.errors import QueueFull, ServeError, Unavailable

T = TypeVar("T")

_FIRST_DELAY_SECONDS = 0.25  # doubled at each try
_MAX_DELAY_SECONDS = 10.0  # also of a Retry-After: who wants to wait longer sets more tries
_MOST_DOUBLINGS = 10  # beyond the longest delay


def parse_retry_after(text: str) -> float | None:
    """A Retry-After in seconds from now: it is a number of seconds, or a date. None = it says nothing of use.

    >>> parse_retry_after("7"), parse_retry_after("0.5"), parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (7.0, 0.5, None)
    """
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return None
        # "-0000" is a date without a zone; HTTP's dates are in GMT.
        seconds = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
        seconds -= datetime.now(UTC).timestamp()
    return seconds if seconds > 0 and math.isfinite(seconds) else None


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
        delay = _FIRST_DELAY_SECONDS * 2.0 ** min(retries_made, _MOST_DOUBLINGS) if asked is None else asked
        delay = min(delay, _MAX_DELAY_SECONDS) * random.uniform(1.0, 1.25)  # not all clients at the same moment
        if call.expires is not None and time.monotonic() + delay >= call.expires:
            return None
        return delay

    def run(self, call: Call, operation: Callable[[], T]) -> T:
        """The operation's result, of the first try that has one.

        Raises:
            ServeError: of the last try.
        """
        retries_made = 0
        while True:
            try:
                return operation()
            except ServeError as error:
                delay = self.delay_seconds(error, retries_made, call)
                if delay is None:
                    raise
            time.sleep(delay)
            retries_made += 1

    async def run_async(self, call: Call, operation: Callable[[], Awaitable[T]]) -> T:
        """As `run`."""
        retries_made = 0
        while True:
            try:
                return await operation()
            except ServeError as error:
                delay = self.delay_seconds(error, retries_made, call)
                if delay is None:
                    raise
            await asyncio.sleep(delay)
            retries_made += 1
