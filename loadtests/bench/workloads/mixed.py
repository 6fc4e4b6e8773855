"""Mixed requests: log-normal inputs, outputs of all lengths, all there at once."""

from __future__ import annotations

import time

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload


class Mixed(Workload):
    name = "mixed"
    metrics = (Metric("tokens_per_second", "tokens/s"), Metric("requests_per_second", "requests/s", compared=False))
    all_at_once = True

    def cases(self, effort: Effort) -> list[Case]:
        case = {"count": effort.mixed, "scale": effort.mixed_scale, "tuning": effort.tuning}
        return [{"name": f"{effort.mixed} requests at once", **case}]

    def at_a_time(self, case: Case) -> int:
        return int(case["count"])

    def tuning_key(self, case: Case) -> str:
        del case
        return self.name

    def trial(self, system: System, case: Case, key: str) -> float:
        return super().trial(system, {**case, "count": case["tuning"]}, key)

    def measure(self, system: System, case: Case, key: str) -> Measured:
        requests = prompts.mixed(prompts.generator(key), case["count"], system.vocab_size, case["scale"])
        began = time.perf_counter()
        system.generate(requests)
        seconds = time.perf_counter() - began
        return Measured(
            {
                "tokens_per_second": prompts.tokens_out(requests) / seconds,
                "requests_per_second": len(requests) / seconds,
            },
            {"seconds": seconds, "requests": [(len(one.ids), one.length) for one in requests]},
        )
