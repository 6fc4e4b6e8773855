"""Seeded requests of random token ids: equal lengths, mixed lengths, and when each arrives."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.bench.shapes import EOS_ID, FIRST_WORD_ID

INPUT_MEDIAN, INPUT_SPREAD = 80, 0.8  # of a log-normal: the spread is that of its logarithm
INPUT_LIMITS = (16, 512)
OUTPUT_LIMITS = (4, 128)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt's ids, EOS last, and how many tokens must come out."""

    ids: tuple[int, ...]
    length: int


def generator(*key: object) -> random.Random:
    """A generator of its own for every key, so that no two rounds share a prompt (a cache would know it)."""
    return random.Random("/".join(map(str, key)))


def prompt(rng: random.Random, tokens: int, vocab_size: int) -> tuple[int, ...]:
    return (*(rng.randrange(FIRST_WORD_ID, vocab_size) for _ in range(tokens - 1)), EOS_ID)


def equal(rng: random.Random, count: int, tokens: int, length: int, vocab_size: int) -> list[Request]:
    return [Request(prompt(rng, tokens, vocab_size), length) for _ in range(count)]


def mixed(rng: random.Random, count: int, vocab_size: int, scale: float = 1.0) -> list[Request]:
    """Input lengths log-normal, clipped; output lengths uniform. `scale` shortens both (for trials of the command)."""
    requests = []
    for _ in range(count):
        drawn = round(rng.lognormvariate(math.log(INPUT_MEDIAN), INPUT_SPREAD))
        tokens = min(max(drawn, INPUT_LIMITS[0]), INPUT_LIMITS[1])
        length = rng.randint(*OUTPUT_LIMITS)
        ids = prompt(rng, max(2, round(tokens * scale)), vocab_size)
        requests.append(Request(ids, max(1, round(length * scale))))
    return requests


def poisson_times(rng: random.Random, count: int, rate: float) -> list[float]:
    """Seconds at which `count` requests are due: exponential gaps of mean 1 / rate, the first at 0.

    Raises:
        ValueError: a rate that is not positive.
    """
    if rate <= 0:
        raise ValueError(f"an arrival rate must be positive, not {rate}")
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times[:count]


def tokens_out(requests: Sequence[Request]) -> int:
    return sum(request.length for request in requests)
