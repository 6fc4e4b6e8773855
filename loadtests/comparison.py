"""Two reports side by side: ratios, and which of them are regressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMPARED = (
    ("ttft_ms", "p50"),
    ("ttft_ms", "p95"),
    ("tpot_ms", "p50"),
    ("tpot_ms", "p95"),
    ("e2e_ms", "p50"),
    ("e2e_ms", "p95"),
)
MIN_SAMPLES = 20  # a percentile of fewer says little: such rows are left out


@dataclass(frozen=True, slots=True)
class Change:
    """`ratio` is new / old; for times above 1 is worse, for rates below 1."""

    what: str
    old: float
    new: float
    ratio: float
    regressed: bool


def compare(old: Mapping[str, Any], new: Mapping[str, Any], max_ratio: float = 1.25) -> list[Change]:
    """Changes of the totals and of every row that both reports have. Worse by more than `max_ratio` is a regression."""
    changes = []
    for name in ("requests_per_second", "tokens_per_second"):
        before, after = old["totals"][name], new["totals"][name]
        if before > 0:
            changes.append(Change(name, before, after, after / before, after * max_ratio < before))
    pairs = [("all", old["totals"], new["totals"])]
    new_rows = {_row_name(row): row for row in new["rows"]}
    pairs += [(name, row, new_rows[name]) for row in old["rows"] if (name := _row_name(row)) in new_rows]
    for name, before, after in pairs:
        for metric, percentile in COMPARED:
            a, b = before["metrics"][metric], after["metrics"][metric]
            if a is None or b is None or min(a["count"], b["count"]) < MIN_SAMPLES or a[percentile] <= 0:
                continue
            ratio = b[percentile] / a[percentile]
            what = f"{name} {metric} {percentile}"
            changes.append(Change(what, a[percentile], b[percentile], ratio, ratio > max_ratio))
    return changes


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What else differs between the runs, so that nobody compares two machines or two loads unaware."""
    found = []
    for section in ("config", "machine", "server"):
        a, b = old.get(section) or {}, new.get(section) or {}
        found += [
            f"{section}.{key}: {a.get(key)!r} -> {b.get(key)!r}"
            for key in sorted(a.keys() | b.keys())
            if a.get(key) != b.get(key) and key not in ("rest", "grpc", "created")
        ]
    return found


def to_markdown(changes: list[Change], notes: list[str]) -> str:
    lines = [f"Rows with at least {MIN_SAMPLES} samples in both reports.", ""]
    lines += ["| what | old | new | new / old | |", "|---|---:|---:|---:|---|"]
    for change in changes:
        mark = "**worse**" if change.regressed else ""
        lines.append(f"| {change.what} | {change.old:.4g} | {change.new:.4g} | {change.ratio:.3f} | {mark} |")
    if notes:
        lines += ["", "The runs also differ in:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _row_name(row: Mapping[str, Any]) -> str:
    return f"{row['protocol']} {row['shape']} {row['mode']}"
