"""Collects measurements and makes the report's numbers of them: exact percentiles over all samples.

locust's own table rounds every time to two digits and knows no tokens, so the report does not come from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.meters import Measurement
from loadtests.workload import Case

REPORT_FORMAT = 1
METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms")
PERCENTILES = (50, 90, 95, 99)
MAX_LISTED_REQUESTS = 4000  # single requests in the report, for the picture


def quantile(ordered: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation between neighbours, as numpy's default does.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    """
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(values: Sequence[float]) -> dict[str, float] | None:
    """count, mean, percentiles and max; None where nothing was measured."""
    if not values:
        return None
    ordered = sorted(values)
    summary = {"count": len(ordered), "mean": sum(ordered) / len(ordered)}
    summary |= {f"p{percent}": quantile(ordered, percent) for percent in PERCENTILES}
    summary["max"] = ordered[-1]
    return {key: round(value, 3) for key, value in summary.items()}


@dataclass(frozen=True, slots=True)
class Goodput:
    """The limits that a good request meets, all of them; None = no limit. Milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def met_by(self, measurement: Measurement) -> bool:
        if measurement.error is not None:
            return False
        pairs = ((getattr(self, name), getattr(measurement, name)) for name in ("ttft_ms", "tpot_ms", "e2e_ms"))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Record:
    protocol: str
    shape: str
    case: Case
    measurement: Measurement

    @property
    def is_right(self) -> bool | None:
        """Whether the expected answer came; None where none is known or the request failed."""
        if self.case.expected is None or self.measurement.error is not None:
            return None
        given = self.measurement.answer if self.case.mode == "cot" else self.measurement.text
        return given is not None and given.strip().rstrip(".").lower() == self.case.expected.lower()


@dataclass(slots=True)
class Recorder:
    """All records of one run. `skipped`: arrivals of an open loop that the bound on requests in flight left out."""

    goodput: Goodput = field(default_factory=Goodput)
    records: list[Record] = field(default_factory=list)
    lags_ms: list[float] = field(default_factory=list)
    skipped: int = 0

    def add(self, protocol: str, shape: str, case: Case, measurement: Measurement) -> None:
        self.records.append(Record(protocol, shape, case, measurement))

    def build(self, run: Mapping[str, Any], expected_rows: Collection[tuple[str, str, str]]) -> dict[str, Any]:
        """The report: what was run (`run`), one row per protocol, shape and mode, and the totals over all.

        `missing_rows` counts the `expected_rows` without one answered request.
        """
        rows: dict[tuple[str, str, str], list[Record]] = {}
        for record in self.records:
            rows.setdefault((record.protocol, record.shape, record.case.mode), []).append(record)
        answered = {key for key, found in rows.items() if any(r.measurement.error is None for r in found)}
        return {
            "format": REPORT_FORMAT,
            **run,
            "rows": [
                {"protocol": protocol, "shape": shape, "mode": mode, **self._aggregate(records)}
                for (protocol, shape, mode), records in sorted(rows.items())
            ],
            "totals": {
                **self._aggregate(self.records),
                "skipped": self.skipped,
                "missing_rows": len(set(expected_rows) - answered),
                "lag_ms": summarise(self.lags_ms),
            },
            "failures": dict(Counter(r.measurement.error for r in self.records if r.measurement.error is not None)),
            "requests": self._list_requests(),
        }

    def _elapsed(self) -> float:
        started = min(r.measurement.started for r in self.records)
        return max(r.measurement.started + r.measurement.e2e_ms / 1000 for r in self.records) - started

    def _aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Rates are over the whole run, so those of the rows add up to the total's."""
        good = [r.measurement for r in records if r.measurement.error is None]
        elapsed = self._elapsed() if records else 0.0
        rate = (lambda count: round(count / elapsed, 3)) if elapsed > 0 else (lambda count: 0.0)
        checked = [right for right in (r.is_right for r in records) if right is not None]
        metrics = {
            name: summarise([v for v in (getattr(m, name) for m in good) if v is not None])
            for name in METRICS
            if name != "itl_ms"
        }
        metrics["itl_ms"] = summarise([gap for m in good for gap in m.itl_ms])
        return {
            "requests": len(records),
            "failed": len(records) - len(good),
            "answers_right": sum(checked),
            "answers_checked": len(checked),
            "prompt_tokens": sum(m.prompt_tokens for m in good),
            "completion_tokens": sum(m.completion_tokens for m in good),
            "requests_per_second": rate(len(good)),
            "tokens_per_second": rate(sum(m.completion_tokens for m in good)),
            "goodput": rate(sum(self.goodput.met_by(r.measurement) for r in records)),
            "metrics": metrics,
        }

    def _list_requests(self) -> list[dict[str, Any]]:
        if not self.records:
            return []
        start = min(r.measurement.started for r in self.records)
        step = math.ceil(len(self.records) / MAX_LISTED_REQUESTS)
        return [
            {
                "protocol": r.protocol,
                "shape": r.shape,
                "case": r.case.name,
                "started_ms": round((r.measurement.started - start) * 1000, 1),
                "e2e_ms": round(r.measurement.e2e_ms, 2),
                "ttft_ms": None if r.measurement.ttft_ms is None else round(r.measurement.ttft_ms, 2),
                "tokens": r.measurement.completion_tokens,
                "error": r.measurement.error,
            }
            for r in self.records[::step]
        ]
