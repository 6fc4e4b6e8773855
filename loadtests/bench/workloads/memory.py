"""Resident memory: against tokens in flight, and after many short requests of which a third is cancelled."""

from __future__ import annotations

import itertools

import psutil

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.prompts import Request
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload

MEBIBYTE = 1 << 20
_SHORT = Request((), 4)  # of the many requests: tokens out
_SHORT_INPUTS = (4, 24)  # tokens in
_ABORT_AFTER = 2  # steps
_EVERY = 3  # one request in so many is cancelled
_MARK = 10  # the first part in so many is what the rest is compared with
_PROMPT_CACHE_BYTES = 1 << 26  # the engine's default: little enough to be full at the mark, for it fills by design


class Memory(Workload):
    """Ours only, each measurement in a new process. `resident_ratio` is memory at the end by memory at the mark, which
    is where a tenth of the requests has been sent."""

    name = "memory"
    metrics = (
        Metric("resident", "MiB", higher_is_better=False),
        Metric("above_idle", "MiB", higher_is_better=False),
        Metric("tokens_in_flight", "tokens"),
        Metric("resident_at_mark", "MiB", higher_is_better=False),
        Metric("resident_ratio", "times", higher_is_better=False),
    )
    ours_only = True
    fresh = True
    max_rounds = 1

    def cases(self, effort: Effort) -> list[Case]:
        lengths = {"prompt": effort.prompt, "output": 2 * effort.output}
        curve = [{"name": f"{count} in flight", "count": count, **lengths} for count in effort.in_flight]
        return [
            *curve,
            {"name": f"{effort.short_requests:,} short requests, a third cancelled", "short": effort.short_requests},
        ]

    def measure(self, system: System, case: Case, key: str) -> Measured:
        return Measured(_short(system, case["short"], key) if "short" in case else _in_flight(system, case, key))


def _in_flight(system: System, case: Case, key: str) -> dict[str, float]:
    """Memory just before the first of `count` equal requests ends."""
    from loadtests.bench.our_system import ours

    own = ours(system)
    rng = prompts.generator(key)
    own.generate(prompts.equal(rng, 1, case["prompt"], case["output"], system.vocab_size))
    idle = resident_bytes()
    for request in prompts.equal(rng, case["count"], case["prompt"], case["output"], system.vocab_size):
        own.submit(request)
    counts: dict[str, int] = {}
    while max(counts.values(), default=0) < case["output"] - 1:
        for name, deltas in own.step().deltas.items():
            counts[name] = counts.get(name, 0) + sum(len(delta.token_ids) for delta in deltas)
    highest = resident_bytes()
    while own.engine.has_work:
        own.step()
    return {
        "resident": highest / MEBIBYTE,
        "above_idle": (highest - idle) / MEBIBYTE,
        "tokens_in_flight": case["prompt"] * len(counts) + sum(counts.values()),
    }


def _short(system: System, count: int, key: str) -> dict[str, float]:
    """Requests that come as fast as they go, a third of them cancelled after some steps."""
    from loadtests.bench.our_system import ours

    own = ours(system)
    own.restart(encoder_cache_bytes=_PROMPT_CACHE_BYTES)
    rng = prompts.generator(key)
    running: dict[str, int] = {}  # request -> the step at which it is cancelled; -1 = never
    sent = 0
    at_mark = 0
    for step in itertools.count():
        while sent < count and len(running) < 32:
            tokens = rng.randint(*_SHORT_INPUTS)
            request = Request(prompts.prompt(rng, tokens, system.vocab_size), _SHORT.length)
            running[own.submit(request)] = step + _ABORT_AFTER if sent % _EVERY == 0 else -1
            sent += 1
        if sent >= count // _MARK and at_mark == 0:
            at_mark = resident_bytes()
        for name in [name for name, end in running.items() if end == step]:
            own.engine.abort(name)
            del running[name]
        if sent == count and not own.engine.has_work:
            break
        for name, deltas in own.step().deltas.items():
            if any(delta.finish_reason is not None for delta in deltas):
                del running[name]
    end = resident_bytes()
    return {"resident": end / MEBIBYTE, "resident_at_mark": at_mark / MEBIBYTE, "resident_ratio": end / at_mark}


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
