"""How much is measured: the sizes of all workloads, for a full run, a quick one, and a trial of the command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """Counts are requests unless they say otherwise; lengths are tokens."""

    prompt: int = 128
    output: int = 32
    batches: tuple[int, ...] = (1, 8, 32)
    tokens_a_go: int = 512  # a small batch is repeated until so many tokens have come out
    mixed: int = 256
    mixed_scale: float = 1.0  # of the mixed requests' lengths
    tuning: int = 96  # mixed requests of one trial of a tuning
    tuning_seconds: float = 300.0  # of one system for one kind of case; its first tuning is tried in any case
    arrivals: int = 256
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)  # of our capacity
    samples: tuple[int, ...] = (1, 4, 16, 64)
    candidates: tuple[int, ...] = (1, 4, 16)
    repeats: int = 8  # calls of one measurement of scoring and of the long prompt
    long_prompt: int = 2000
    streams: int = 8
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    turnover: int = 2  # requests of scaling for each that is in progress at a time
    in_flight: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    short_requests: int = 10_000
    quality_prompts: int = 500


EFFORTS = {
    "full": Effort(),
    "quick": Effort(
        tokens_a_go=64,
        mixed=40,
        tuning=24,
        tuning_seconds=10.0,
        arrivals=8,
        samples=(1, 4, 16),
        repeats=2,
        concurrency=(1, 4, 16),
        turnover=1,
        in_flight=(1, 32),
        quality_prompts=100,
    ),
    "trial": Effort(
        prompt=8,
        output=4,
        batches=(1, 3),
        tokens_a_go=4,
        mixed=6,
        mixed_scale=0.1,
        tuning=4,
        arrivals=5,
        loads=(0.5, 1.2),
        samples=(1, 4),
        candidates=(1, 3),
        repeats=1,
        long_prompt=40,
        streams=2,
        concurrency=(1, 4),
        in_flight=(1, 4),
        short_requests=60,
        quality_prompts=6,
    ),
}
