"""Throughput against concurrency: so many requests in progress, a new one for each that ends."""

from __future__ import annotations

import time

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload

_AT_LEAST = 2  # requests


class Scaling(Workload):
    """Peers take the requests in batches of that size, sorted by input length."""

    name = "scaling"
    metrics = (Metric("tokens_per_second", "tokens/s"),)

    def cases(self, effort: Effort) -> list[Case]:
        return [
            {
                "name": f"{count} at a time",
                "at_once": count,
                "count": max(_AT_LEAST, effort.turnover * count),
                "scale": effort.mixed_scale,
            }
            for count in effort.concurrency
        ]

    def at_a_time(self, case: Case) -> int:
        return int(case["at_once"])

    def trial(self, system: System, case: Case, key: str) -> float:
        return super().trial(system, {**case, "count": max(_AT_LEAST, case["at_once"])}, key)

    def measure(self, system: System, case: Case, key: str) -> Measured:
        requests = prompts.mixed(prompts.generator(key), case["count"], system.vocab_size, case["scale"])
        began = time.perf_counter()
        system.generate(requests, at_once=case["at_once"])
        seconds = time.perf_counter() - began
        return Measured({"tokens_per_second": prompts.tokens_out(requests) / seconds})
