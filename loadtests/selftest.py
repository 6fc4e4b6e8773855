"""Do the meters tell the truth? The whole chain - locust, clients, meters, recorder - against a stub with known delays.

Three runs: a closed loop (times and counts), one with refusals (every failure is counted), and an open loop above the
stub's capacity (the wait before sending is in the latency).
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import smoke

FIRST_MS, GAP_MS, TOKENS = 60.0, 15.0, 12
# On a busy two-core machine a median may be late by this much, and is never early but for the clock's grain.
LATE_MS, EARLY_MS = 40.0, 2.0
LATE_GAP_MS = 8.0
ARRIVAL_RATE = 16.0  # twice what two of the stub's slots can do
MAX_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Check:
    what: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        return f"{mark} {self.what}: {self.value:.2f} in [{self.low:.2f}, {self.high:.2f}]"


@contextmanager
def running_stub(*arguments: str) -> Iterator[tuple[str, str]]:
    """A stub in a process of its own (threads of its own, no gevent); gives its (REST URL, gRPC target)."""
    command = [sys.executable, "-m", "loadtests.stub", "--seconds", "120", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = dict(word.split("=", 1) for word in process.stdout.readline().split()[1:])
            yield words["rest"], words["grpc"]
        finally:
            process.terminate()


def run(folder: Path, requests: int) -> list[Check]:
    """All checks; each of the three runs sends so many requests (a count, so that a slow machine only takes longer)."""
    delays = ("--first-ms", str(FIRST_MS), "--gap-ms", str(GAP_MS), "--tokens", str(TOKENS))
    checks = []
    with running_stub(*delays) as (rest, grpc):
        result = smoke.run(smoke.Load(rest, grpc, MAX_SECONDS, users=4, max_requests=requests), folder / "closed")
        checks += check_times(result) + check_counts(result, _counts(rest))
    with running_stub(*delays, "--refuse-every", "5") as (rest, grpc):
        result = smoke.run(smoke.Load(rest, grpc, MAX_SECONDS, users=4, max_requests=requests), folder / "refusals")
        checks += check_counts(result, _counts(rest))
    with running_stub(*delays, "--capacity", "2") as (rest, grpc):
        load = smoke.Load(rest, grpc, MAX_SECONDS, arrival_rate=ARRIVAL_RATE, users=1, max_requests=requests)
        checks += check_open_loop(smoke.run(load, folder / "open"), _counts(rest))
    return checks


def check_times(result: Mapping[str, Any]) -> list[Check]:
    """Each meter's median against the stub's delay, for both protocols apart."""
    last = FIRST_MS + GAP_MS * (TOKENS - 1)
    checks = [Check("rows (protocol x shape x mode)", len(result["rows"]), 16, 16)]
    for row in result["rows"]:
        name, metrics = f"{row['protocol']} {row['shape']} {row['mode']}", row["metrics"]
        checks.append(Check(f"{name} e2e p50", metrics["e2e_ms"]["p50"], last - EARLY_MS, last + 2 * LATE_MS))
        if row["shape"] == "stream":
            checks += [
                Check(f"{name} ttft p50", metrics["ttft_ms"]["p50"], FIRST_MS - EARLY_MS, FIRST_MS + LATE_MS),
                Check(f"{name} tpot p50", metrics["tpot_ms"]["p50"], GAP_MS - EARLY_MS, GAP_MS + LATE_GAP_MS),
                Check(f"{name} itl p50", metrics["itl_ms"]["p50"], GAP_MS - EARLY_MS, GAP_MS + LATE_GAP_MS),
            ]
    return checks


def check_counts(result: Mapping[str, Any], counts: Mapping[str, int]) -> list[Check]:
    """Nothing is lost between the stub and the report: requests, refusals, tokens."""
    totals = result["totals"]
    served, refused = counts["served"], counts["refused"]
    return [
        Check("requests = the stub's count", totals["requests"], served + refused, served + refused),
        Check("failed = the stub's refusals", totals["failed"], refused, refused),
        Check("tokens = served requests x tokens", totals["completion_tokens"], served * TOKENS, served * TOKENS),
    ]


def check_open_loop(result: Mapping[str, Any], counts: Mapping[str, int]) -> list[Check]:
    """Above capacity the queue grows for the whole run, so the mean wait is about half of what it is at the end.

    A meter that counted from the actual send, or a loop that waited for its requests, would show no wait at all. And
    beyond queue and service there is nothing: many requests in flight do not delay each other in the generator.
    """
    service = (FIRST_MS + GAP_MS * (TOKENS - 1)) / 1000
    arrived = counts["served"]
    seconds = max(request["started_ms"] for request in result["requests"]) / 1000
    drained = arrived * service / 2  # the time that two slots need for all of it
    wait_ms = (drained - seconds) / 2 * 1000
    e2e = result["totals"]["metrics"]["e2e_ms"]
    own_ms = [
        Check(
            f"open loop: {row['protocol']} {row['shape']} {row['mode']} e2e - queue time",
            row["metrics"]["e2e_ms"]["mean"] - row["metrics"]["queue_ms"]["mean"],
            service * 1000 - EARLY_MS,
            service * 1000 + 3 * LATE_MS,
        )
        for row in result["rows"]
    ]
    return [
        *check_counts(result, counts),
        *own_ms,
        Check("open loop: arrivals a second", arrived / seconds, ARRIVAL_RATE * 0.5, ARRIVAL_RATE * 1.6),
        Check("open loop: mean e2e", e2e["mean"], service * 1000 + 0.5 * wait_ms, service * 1000 + 2 * wait_ms + 500),
        Check("open loop: mean queue time", result["totals"]["metrics"]["queue_ms"]["mean"], 0.5 * wait_ms, 1e9),
    ]


def _counts(rest: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{rest}/counts", timeout=10) as response:
        counts: dict[str, int] = json.load(response)
    return counts
