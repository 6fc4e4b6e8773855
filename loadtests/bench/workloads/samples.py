"""Several samples of one prompt, at temperature 1, from one encoder pass."""

from __future__ import annotations

import time

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.prompts import Request
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload


class Samples(Workload):
    name = "samples"
    metrics = (
        Metric("tokens_per_second", "tokens/s"),
        Metric("encoder_passes", "prompts encoded for one request", higher_is_better=False, compared=False),
    )

    def cases(self, effort: Effort) -> list[Case]:
        return [
            {
                "name": f"n = {count}",
                "count": count,
                "repeats": max(1, effort.tokens_a_go // (count * effort.output)),
                "prompt": effort.prompt,
                "output": effort.output,
            }
            for count in effort.samples
        ]

    def measure(self, system: System, case: Case, key: str) -> Measured:
        rng = prompts.generator(key)
        asked = [
            Request(prompts.prompt(rng, case["prompt"], system.vocab_size), case["output"])
            for _ in range(case["repeats"])
        ]
        before = encoded_tokens(system)
        began = time.perf_counter()
        for seed, request in enumerate(asked):
            system.sample(request, case["count"], seed)
        seconds = time.perf_counter() - began
        metrics = {"tokens_per_second": case["count"] * prompts.tokens_out(asked) / seconds}
        if (encoded := encoded_tokens(system)) is not None:
            metrics["encoder_passes"] = (encoded - (before or 0)) / (len(asked) * case["prompt"])
        return Measured(metrics)


def encoded_tokens(system: System) -> int | None:
    """Prompt tokens that the system has encoded so far; None for one that does not count them."""
    return getattr(system, "encoded_tokens", None)
