"""Objectives: what a run must keep to, as data, with a verdict each.

[goodput]                      # limits of a single good request
ttft_ms = 500

[[objective]]
metric = "ttft_ms"             # a metric of the report with `percentile`, or a number of its totals
percentile = 95
max = 800                      # or: min
protocol = "rest"              # optional, as are shape and mode: every row that matches must keep to it
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.recorder import METRICS, PERCENTILES, Goodput

OBJECTIVES_DIR = Path(__file__).parent / "objectives"
TOTALS = (
    "failed_ratio",
    "wrong_ratio",
    "requests",
    "requests_per_second",
    "tokens_per_second",
    "goodput",
    "skipped",
    "missing_rows",
)


@dataclass(frozen=True, slots=True)
class Objective:
    metric: str
    percentile: int | None = None
    max: float | None = None
    min: float | None = None
    protocol: str | None = None
    shape: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if (self.max is None) == (self.min is None):
            raise ValueError(f"objective {self.metric}: give either max or min")
        timed = self.metric in METRICS or self.metric == "lag_ms"
        if not timed and self.metric not in TOTALS:
            raise ValueError(f"objective {self.metric}: no such metric; there are {', '.join((*METRICS, *TOTALS))}")
        if timed and self.percentile not in PERCENTILES:
            raise ValueError(f"objective {self.metric}: percentile must be one of {PERCENTILES}")
        if not timed and (self.percentile is not None or self._has_row):
            raise ValueError(f"objective {self.metric}: it is a total and has no percentile, protocol, shape or mode")

    @property
    def _has_row(self) -> bool:
        return any(value is not None for value in (self.protocol, self.shape, self.mode))

    def values(self, report: Mapping[str, Any]) -> list[tuple[str, float | None]]:
        """(where, value) of each number it speaks of; None: nothing was measured, which no objective allows."""
        name = self.metric if self.percentile is None else f"{self.metric} p{self.percentile}"
        totals = report["totals"]
        if self.metric == "failed_ratio":
            return [(name, totals["failed"] / totals["requests"] if totals["requests"] else None)]
        if self.metric == "wrong_ratio":
            checked = totals["answers_checked"]
            return [(name, 1 - totals["answers_right"] / checked if checked else None)]
        if self.metric == "lag_ms":
            return [(name, _percentile(totals["lag_ms"], self.percentile))]
        if self.metric in TOTALS:
            return [(name, totals[self.metric])]
        if not self._has_row:
            return [(name, _percentile(totals["metrics"][self.metric], self.percentile))]
        rows = [row for row in report["rows"] if self._matches(row)]
        found: list[tuple[str, float | None]] = [
            (f"{name} {row['protocol']} {row['shape']} {row['mode']}", _percentile(summary, self.percentile))
            for row in rows
            if (summary := row["metrics"][self.metric]) is not None
        ]
        return found or [(f"{name} (no such row)", None)]

    def _matches(self, row: Mapping[str, Any]) -> bool:
        wanted = {"protocol": self.protocol, "shape": self.shape, "mode": self.mode}
        return all(value is None or row[key] == value for key, value in wanted.items())

    def allows(self, value: float | None) -> bool:
        if value is None:
            return False
        return value <= self.max if self.max is not None else value >= (self.min or 0.0)


@dataclass(frozen=True, slots=True)
class Objectives:
    goodput: Goodput
    objectives: tuple[Objective, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    value: float | None
    limit: str
    kept: bool


def load(name: str) -> Objectives:
    """An objective file that ships with the package, by name, or one of your own, by path.

    Raises:
        ValueError: the file is missing, or has an unknown key, metric or percentile.
    """
    path = Path(name) if name.endswith(".toml") else OBJECTIVES_DIR / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in OBJECTIVES_DIR.glob("*.toml")))
        raise ValueError(f"no objectives {name!r}: give a .toml file or one of {known}")
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        goodput = Goodput(**data.pop("goodput", {}))
        objectives = tuple(Objective(**raw) for raw in data.pop("objective"))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from None
    if data:
        raise ValueError(f"{path}: unknown key {next(iter(data))!r}")
    return Objectives(goodput, objectives)


def check(report: Mapping[str, Any], objectives: Objectives) -> list[Verdict]:
    return [
        Verdict(what, value, _limit(objective), objective.allows(value))
        for objective in objectives.objectives
        for what, value in objective.values(report)
    ]


def _limit(objective: Objective) -> str:
    return f"<= {objective.max:g}" if objective.max is not None else f">= {objective.min:g}"


def _percentile(summary: Mapping[str, float] | None, percentile: int | None) -> float | None:
    return None if summary is None else summary[f"p{percentile}"]
