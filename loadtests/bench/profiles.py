"""Where our own time goes when all requests are there at once, and the least that each part takes at the best rates.

What the kernels do is told by themselves (serve.engine.native.profile); the rest is `outside`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.bench.bounds import Work
from loadtests.bench.shapes import Shape
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Workload

# Parts that have a least time come first; `bounds.Work.least` names them.
BOUNDED = ("encoder products", "encoder attention", "decoder products", "decoder attention", "head products")
PARTS = (*BOUNDED, "rounding", "by row", "waiting", "outside")
MOST_RUNS = 3


def take(workload: Workload, system: System, case: Case, key: str, runs: int) -> dict[str, Any]:
    """Seconds of all, seconds by part, and [tokens in, tokens out] of each request: the median of some runs."""
    from serve.engine.native.profile import profiled

    taken = []
    for number in range(runs):
        with profiled() as profile:
            data = workload.measure(system, case, f"{key}/{number}").data
        parts = dict.fromkeys(PARTS, 0.0)
        for (job, part), seconds in profile.seconds.items():
            name = f"{job} {part}" if f"{job} {part}" in BOUNDED else part.replace("_", " ")
            if name in PARTS:  # single products, which torch asked for, are outside
                parts[name] += seconds
        parts["outside"] = max(0.0, data["seconds"] - sum(parts.values()))
        taken.append({"seconds": data["seconds"], "parts": parts, "requests": data["requests"]})
    return sorted(taken, key=lambda one: float(one["seconds"]))[len(taken) // 2]


def build(
    taken: Sequence[Mapping[str, Any]], shapes: Mapping[str, Shape], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """`take`'s results, each with its names and `at_once`, as records that say the least seconds of each part, too."""
    records = []
    for one in taken:
        if one["mode"] not in rates:
            continue
        requests = [(prompt, output) for prompt, output in one["requests"]]
        work = Work.of(shapes[one["shape"]], requests, one["at_once"])
        names = {name: one[name] for name in ("shape", "workload", "case", "mode", "seconds", "parts")}
        records.append({**names, "tokens": work.tokens, "least": work.least(one["mode"], rates)})
    return records
