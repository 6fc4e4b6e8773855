"""Ratios of ours to a peer, paired round by round, with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loadtests.bench.workloads.base import Metric, Row, Workload

OURS = "ours"
Key = tuple[str, str, str]  # shape, workload, case


def ratio(ours: float, peer: float, metric: Metric) -> float | None:
    """How far ours is ahead: above 1 is ahead, whichever way the metric goes. None where a side has nothing.

    >>> ratio(30.0, 20.0, Metric("rate", "tokens/s"))
    1.5
    >>> ratio(0.5, 1.0, Metric("time", "s", higher_is_better=False))
    2.0
    """
    if not (ours > 0 and peer > 0 and math.isfinite(ours) and math.isfinite(peer)):
        return None
    return ours / peer if metric.higher_is_better else peer / ours


def build(rows: Sequence[Row], workloads: Mapping[str, Workload]) -> list[dict[str, Any]]:
    """A record for every shape, workload, case, compared metric, setting of ours, and peer.

    `ratio` is the median over rounds of the ratios within a round, `low` and `high` are their least and greatest;
    `ours` and `theirs` are the medians of the metric itself.
    """
    records = []
    for (shape, workload, case), group in grouped(rows).items():
        metrics = [metric for metric in workloads[workload].metrics if metric.compared]
        titles = list(dict.fromkeys((row["system"], row["setting"]) for row in group))
        for metric in metrics:
            values = {title: by_round(group, title, metric.name) for title in titles}
            for title in titles:
                for peer, theirs in _peers(title, values, group, metric).items():
                    record = {"shape": shape, "workload": workload, "case": case, "metric": metric.name}
                    found = paired(values[title], theirs, metric)
                    if found is not None:
                        records.append(record | {"unit": metric.unit, "setting": title[1], "peer": peer} | found)
    return records


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], metric: Metric) -> dict[str, float] | None:
    """The ratios of the rounds that both have, as {ratio, low, high, rounds, ours, theirs}."""
    common = [number for number in ours if number in theirs]
    found = [value for n in common if (value := ratio(ours[n], theirs[n], metric)) is not None]
    if not found:
        return None
    return {
        "ratio": statistics.median(found),
        "low": min(found),
        "high": max(found),
        "rounds": len(found),
        "ours": statistics.median(ours[n] for n in common),
        "theirs": statistics.median(theirs[n] for n in common),
    }


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The rows of each shape, workload and case, in the order of their first ones."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["workload"], row["case"]), []).append(row)
    return groups


def by_round(rows: Iterable[Row], title: tuple[str, str], metric: str) -> dict[int, float]:
    """round -> the metric's value, of one system in one setting."""
    return {
        row["round"]: row["metrics"][metric]
        for row in rows
        if (row["system"], row["setting"]) == title and metric in row["metrics"]
    }


def _peers(
    title: tuple[str, str], values: Mapping[tuple[str, str], dict[int, float]], group: Sequence[Row], metric: Metric
) -> dict[str, dict[int, float]]:
    """What a title of ours is compared with: name -> round -> value; nothing for a peer."""
    if title[0] != OURS:
        return {}
    peers = {" ".join(other): found for other, found in values.items() if other[0] != OURS}
    published: Mapping[str, tuple[str, float]] = next((row["published"] for row in group if row.get("published")), {})
    if metric.name in published:
        whose, value = published[metric.name]
        peers[whose] = dict.fromkeys(values[title], value)
    return peers
