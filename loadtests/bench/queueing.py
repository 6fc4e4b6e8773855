"""The scheduler that a user would write around a batch system: whatever waits is the next batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from loadtests.bench.prompts import Request
from loadtests.bench.system import OnToken

Generate = Callable[[Sequence[Request], OnToken], object]


def serve_in_batches(
    generate: Generate,
    requests: Sequence[Request],
    due: Sequence[float],
    *,
    largest: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[list[float]]:
    """When each token of each request was known, in seconds after the start; `due` must not decrease.

    `largest` bounds a batch (0 = all that wait). A request's token counts when `generate` tells of it.
    """
    told: list[list[float]] = [[] for _ in requests]
    began = clock()
    first = 0
    while first < len(requests):
        wait = due[first] - (clock() - began)
        if wait > 0:
            sleep(wait)
        now = clock() - began
        last = first + 1
        while last < len(requests) and due[last] <= now and (largest == 0 or last - first < largest):
            last += 1
        offset = first

        def tell(place: int, offset: int = offset) -> None:
            told[offset + place].append(clock() - began)

        generate(requests[first:last], tell)
        first = last
    return told
