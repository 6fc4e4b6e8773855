"""Rank classification: one prompt, the log-probability of each of its candidates."""

from __future__ import annotations

import time

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload

_LENGTHS = (2, 8)  # tokens of a candidate, EOS among them


class Score(Workload):
    name = "score"
    metrics = (Metric("prompts_per_second", "prompts/s"),)

    def cases(self, effort: Effort) -> list[Case]:
        return [
            {
                "name": f"{count} candidate{'s' if count > 1 else ''}",
                "count": count,
                "repeats": effort.repeats,
                "prompt": effort.prompt,
            }
            for count in effort.candidates
        ]

    def measure(self, system: System, case: Case, key: str) -> Measured:
        rng = prompts.generator(key)
        size = system.vocab_size
        asked = [
            (
                prompts.prompt(rng, case["prompt"], size),
                [prompts.prompt(rng, rng.randint(*_LENGTHS), size) for _ in range(case["count"])],
            )
            for _ in range(case["repeats"])
        ]
        began = time.perf_counter()
        for ids, candidates in asked:
            system.score(ids, candidates)
        return Measured({"prompts_per_second": len(asked) / (time.perf_counter() - began)})
