"""A long prompt arrives while streams run: how long they stand still."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload

if TYPE_CHECKING:
    from loadtests.bench.our_system import OurSystem

_BEFORE = _AFTER = 16  # tokens of each stream before and after the arrival


class LongPrompt(Workload):
    """Ours only. One encode batch bounds the pause, so its own time is measured too, alone."""

    name = "long"
    metrics = (
        Metric("largest_gap", "s", higher_is_better=False),
        Metric("typical_gap", "s", higher_is_better=False),
        Metric("gap_by_typical", "times", higher_is_better=False),
        Metric("encode_batch", "s", higher_is_better=False),
        Metric("gap_by_encode_batch", "times", higher_is_better=False),
        Metric("long_prompt_ttft", "s", higher_is_better=False),
        Metric("encode_tokens_per_step", "tokens"),
    )
    ours_only = True

    def cases(self, effort: Effort) -> list[Case]:
        case = {"streams": effort.streams, "prompt": effort.prompt, "long": effort.long_prompt}
        return [{"name": f"{effort.long_prompt} tokens arrive at {effort.streams} streams", **case}]

    def measure(self, system: System, case: Case, key: str) -> Measured:
        from loadtests.bench.our_system import ours

        own = ours(system)
        rng = prompts.generator(key)
        streams = prompts.equal(rng, case["streams"], case["prompt"], _BEFORE + _AFTER, system.vocab_size)
        keys = [own.submit(request) for request in streams]
        told: dict[str, list[float]] = {key: [] for key in keys}
        while min(map(len, told.values())) < _BEFORE:
            _step(own, told)
        arrival = time.perf_counter()
        [long] = prompts.equal(rng, 1, case["long"], 1, system.vocab_size)
        newcomer = own.submit(long)
        told[newcomer] = []
        while own.engine.has_work:
            _step(own, told)
        [first] = told.pop(newcomer)
        bounded = _encode_batch(own, rng, max(own.encode_tokens_per_step, case["long"]))
        before, after = _gaps(told.values(), arrival)
        typical = statistics.median(before)
        return Measured(
            {
                "largest_gap": max(after),
                "typical_gap": typical,
                "gap_by_typical": max(after) / typical,
                "encode_batch": bounded,
                "gap_by_encode_batch": max(after) / bounded,
                "long_prompt_ttft": first - arrival,
                "encode_tokens_per_step": own.encode_tokens_per_step,
            }
        )


def _encode_batch(own: OurSystem, rng: random.Random, tokens: int) -> float:
    """Seconds of a step that encodes so many tokens, as one prompt, and decodes for it alone."""
    own.generate(prompts.equal(rng, 1, 2, 1, own.vocab_size))
    [full] = prompts.equal(rng, 1, tokens, 1, own.vocab_size)
    own.submit(full)
    began = time.perf_counter()
    own.step()
    seconds = time.perf_counter() - began
    while own.engine.has_work:
        own.step()
    return seconds


def _step(own: OurSystem, told: Mapping[str, list[float]]) -> None:
    deltas = own.step().deltas
    now = time.perf_counter()
    for key in deltas:
        told[key].append(now)


def _gaps(streams: Iterable[Sequence[float]], arrival: float) -> tuple[list[float], list[float]]:
    """Seconds between neighbouring tokens of all streams: (those that ended before `arrival`, the rest)."""
    pairs = [pair for times in streams for pair in pairwise(times)]
    return [b - a for a, b in pairs if b <= arrival], [b - a for a, b in pairs if b > arrival]
