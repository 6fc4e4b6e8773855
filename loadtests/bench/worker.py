"""A system in a process of its own: `python -m loadtests.bench.worker`, one JSON object a line in, one out."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from loadtests.bench import profiles, verification
from loadtests.bench.system import Place, System, Tuning
from loadtests.bench.workloads.memory import resident_bytes
from loadtests.bench.workloads.registry import WORKLOADS


def open_system(name: str, setting: str, place: Place) -> System:
    """Load a system; what it needs is imported here and not before.

    Raises:
        ValueError: no such system.
    """
    if name == "ours":
        from loadtests.bench.our_system import OurSystem

        return OurSystem(place, setting)
    if name == "transformers":
        from loadtests.bench.transformers_system import TransformersSystem

        return TransformersSystem(place, setting)
    if name == "ctranslate2":
        from loadtests.bench.ctranslate2_system import CTranslate2System

        return CTranslate2System(place, setting)
    if name == "vllm":
        from loadtests.bench.vllm_system import VllmSystem

        return VllmSystem(place, setting)
    raise ValueError(f"no system {name!r}")


class Worker:
    """Answers one call after the other. A system is loaded once, and tunings are kept by workload and case."""

    def __init__(self) -> None:
        self._system: System | None = None
        self._device = ""
        self._warm: set[str] = set()  # workloads

    @property
    def system(self) -> System:
        if self._system is None:
            raise RuntimeError("no system is loaded")
        return self._system

    def load(self, name: str, setting: str, place: dict[str, Any]) -> dict[str, Any]:
        self._system = open_system(name, setting, Place(**place))
        self._device = place["device"]
        return {"resident_bytes": resident_bytes()}

    def tune(self, workload: str, case: dict[str, Any], key: str, seconds: float) -> dict[str, Any]:
        """Try tunings (each with prompts of its own) for so many seconds, which also warms up: all, and the best."""
        kind = WORKLOADS[workload]
        tried: list[dict[str, Any]] = []
        began = time.monotonic()
        candidates = self.system.candidates(kind.at_a_time(case))
        if len(candidates) == 1 and self._device == "cpu" and workload in self._warm:  # a card warms up case by case
            only = {"tuning": asdict(candidates[0]), "text": str(candidates[0]), "value": None}
            return {"tried": [only], "best": only, "offered": 1}
        self._warm.add(workload)
        for number, tuning in enumerate(candidates):
            if number > 0 and time.monotonic() - began > seconds:
                break
            self.system.use(tuning)
            value = kind.trial(self.system, case, f"{key}/{number}")
            tried.append({"tuning": asdict(tuning), "text": str(tuning), "value": value})
        best = max(tried, key=lambda one: float(one["value"]))
        return {"tried": tried, "best": best, "offered": len(candidates)}

    def measure(self, workload: str, case: dict[str, Any], key: str, tuning: dict[str, Any] | None) -> dict[str, Any]:
        if tuning is not None:
            self.system.use(Tuning(**tuning))
        measured = WORKLOADS[workload].measure(self.system, case, key)
        return {"metrics": measured.metrics, "data": measured.data, "resident_bytes": resident_bytes()}

    def profile(self, workload: str, case: dict[str, Any], key: str, runs: int) -> dict[str, Any]:
        """Where our time goes, see profiles.take."""
        return profiles.take(WORKLOADS[workload], self.system, case, key, runs)

    def verify(self, key: str) -> dict[str, Any]:
        return verification.produce(self.system, key)


def main() -> int:
    """Serve calls until the input ends. Whatever libraries print goes to the error stream."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    calls: dict[str, Callable[..., dict[str, Any]]] = {
        "load": worker.load,
        "tune": worker.tune,
        "measure": worker.measure,
        "profile": worker.profile,
        "verify": worker.verify,
    }
    for line in sys.stdin:
        call = json.loads(line)
        try:
            reply: dict[str, Any] = {"result": calls[call["call"]](**call["arguments"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
