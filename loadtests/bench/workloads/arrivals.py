"""Mixed requests that arrive by themselves, at shares of our capacity: what each waits for."""

from __future__ import annotations

from collections.abc import Sequence

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.prompts import Request
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, MeasureOurs, Metric, Workload
from loadtests.bench.workloads.mixed import Mixed
from loadtests.recorder import quantile

GOOD_FIRST_TOKEN_SECONDS = 1.0  # a good request has its first token by then
GOOD_SECONDS_A_TOKEN = 0.1  # and so much time for each of the others, on the average
PERCENTILES = (50, 95, 99)


class Arrivals(Workload):
    """Poisson arrivals; all systems get the same requests at the same times, so a slow one builds up a queue."""

    name = "arrivals"
    metrics = (
        Metric("ttft_p95", "s", higher_is_better=False),
        *(Metric(f"ttft_p{percent}", "s", higher_is_better=False) for percent in (50, 99)),
        *(Metric(f"latency_p{percent}", "s", higher_is_better=False) for percent in PERCENTILES),
        Metric("goodput", "good requests/s"),
    )

    def cases(self, effort: Effort) -> list[Case]:
        [mixed] = Mixed().cases(effort)
        return [
            {"name": f"{load:.0%} of our capacity", "load": load, **_sized(mixed, effort.arrivals)}
            for load in effort.loads
        ]

    def prepare(self, cases: list[Case], measure_ours: MeasureOurs) -> list[Case]:
        """Set `rate`, requests a second. Our capacity is that of mixed requests which are all there."""
        capacity = measure_ours(Mixed(), {**cases[0], "name": "our capacity"})["requests_per_second"]
        return [{**case, "rate": case["load"] * capacity} for case in cases]

    def at_a_time(self, case: Case) -> int:
        return int(case["count"])

    def tuning_key(self, case: Case) -> str:
        return Mixed().tuning_key(case)

    def trial(self, system: System, case: Case, key: str) -> float:
        return Mixed().trial(system, case, key)

    def measure(self, system: System, case: Case, key: str) -> Measured:
        rng = prompts.generator(key)
        requests = prompts.mixed(rng, case["count"], system.vocab_size, case["scale"])
        due = prompts.poisson_times(rng, case["count"], case["rate"])
        return Measured(summarise(requests, due, system.serve(requests, due)))


def _sized(mixed: Case, count: int) -> Case:
    return {key: value for key, value in mixed.items() if key != "name"} | {"count": count}


def summarise(requests: Sequence[Request], due: Sequence[float], told: Sequence[Sequence[float]]) -> dict[str, float]:
    """Percentiles of the time to the first and to the last token, seconds after a request was due, and goodput."""
    firsts = sorted(times[0] - start for times, start in zip(told, due, strict=True))
    lasts = sorted(times[-1] - start for times, start in zip(told, due, strict=True))
    good = 0
    for request, start, times in zip(requests, due, told, strict=True):
        in_time = times[0] - start <= GOOD_FIRST_TOKEN_SECONDS
        good += in_time and times[-1] - times[0] <= GOOD_SECONDS_A_TOKEN * (request.length - 1)
    metrics = {f"ttft_p{percent}": quantile(firsts, percent) for percent in PERCENTILES}
    metrics |= {f"latency_p{percent}": quantile(lasts, percent) for percent in PERCENTILES}
    return metrics | {"goodput": good / max(times[-1] for times in told)}
