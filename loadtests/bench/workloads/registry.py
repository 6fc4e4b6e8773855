"""All workloads by name, in the order they run."""

from __future__ import annotations

from loadtests.bench.workloads.arrivals import Arrivals
from loadtests.bench.workloads.base import Workload
from loadtests.bench.workloads.long_prompt import LongPrompt
from loadtests.bench.workloads.memory import Memory
from loadtests.bench.workloads.mixed import Mixed
from loadtests.bench.workloads.quality import Quality
from loadtests.bench.workloads.samples import Samples
from loadtests.bench.workloads.scaling import Scaling
from loadtests.bench.workloads.score import Score
from loadtests.bench.workloads.uniform import Uniform
from loadtests.bench.workloads.xl import XL

_CLASSES = (Uniform, Mixed, Arrivals, Samples, Score, LongPrompt, Scaling, Memory, Quality, XL)
WORKLOADS: dict[str, Workload] = {workload.name: workload() for workload in _CLASSES}


def default(device: str) -> list[str]:
    """What runs when nothing is asked for: on a card, its own workload; else all but that."""
    return ["xl"] if device == "cuda" else [name for name in WORKLOADS if name != "xl"]
