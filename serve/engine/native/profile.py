"""Where the kernels' time goes: by job (the decoder's steps, the encoder, the head), and by what is done there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.engine.native.library import JOBS, PARTS, ClockTable, Level, level, loaded


@dataclass(slots=True)
class Profile:
    """Seconds by (job, part), as the first thread of each job has them; empty without kernels.

    Jobs are `decoder`, `encoder`, `head` and `single` (an operation that torch asked for); parts are `products` with
    weights, `attention`, `rounding` of activations to integers, what is done row `by_row` (norms, activations,
    copies), and `waiting` for the other threads.
    """

    seconds: dict[tuple[str, str], float] = field(default_factory=dict)


_busy = False


@contextmanager
def profiled() -> Iterator[Profile]:
    """Fill in, at its end, a profile of what the kernels do meanwhile.

    The clock took between 0 and 1 % of batches of 1, and nothing measurable of 32 (Flan-T5-small, pairs of runs).

    Raises:
        RuntimeError: there is another one.
    """
    global _busy
    profile = Profile()
    if level() is Level.NONE:
        yield profile
        return
    if _busy:
        raise RuntimeError("the kernels have one profile at a time")
    clock = ClockTable()
    _busy = True
    loaded().flan_profile(clock)
    try:
        yield profile
    finally:
        loaded().flan_profile(None)
        _busy = False
        for job, of_parts in zip(JOBS, clock.seconds, strict=True):
            profile.seconds |= {(job, part): time for part, time in zip(PARTS, of_parts, strict=True) if time > 0}
