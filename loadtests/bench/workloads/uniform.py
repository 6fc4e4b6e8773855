"""Uniform batches: equal prompts, equal output lengths, one batch at a time."""

from __future__ import annotations

import time

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload


class Uniform(Workload):
    name = "uniform"
    metrics = (Metric("tokens_per_second", "tokens/s"),)
    all_at_once = True

    def cases(self, effort: Effort) -> list[Case]:
        return [
            {
                "name": f"batch {count}, {effort.prompt} in, {effort.output} out",
                "count": count,
                "repeats": max(1, effort.tokens_a_go // (count * effort.output)),
                "prompt": effort.prompt,
                "output": effort.output,
            }
            for count in effort.batches
        ]

    def at_a_time(self, case: Case) -> int:
        return int(case["count"])

    def measure(self, system: System, case: Case, key: str) -> Measured:
        rng = prompts.generator(key)
        batches = [
            prompts.equal(rng, case["count"], case["prompt"], case["output"], system.vocab_size)
            for _ in range(case["repeats"])
        ]
        began = time.perf_counter()
        for batch in batches:
            system.generate(batch)
        seconds = time.perf_counter() - began
        sizes = [(len(one.ids), one.length) for batch in batches for one in batch]
        return Measured(
            {"tokens_per_second": sum(map(prompts.tokens_out, batches)) / seconds},
            {"seconds": seconds, "requests": sizes},
        )
