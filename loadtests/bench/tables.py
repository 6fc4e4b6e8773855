"""A run's record as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.bench import ratios
from loadtests.bench.profiles import PARTS
from loadtests.bench.workloads.base import Metric
from loadtests.bench.workloads.registry import WORKLOADS

Record = Mapping[str, Any]


def to_markdown(record: Record, picture: str | None = None) -> str:
    """The whole page; `picture` is a file name to show."""
    lines = [*_head(record), ""]
    if picture is not None:
        lines += [f"![ratios]({picture})", ""]
    for shape in dict.fromkeys(row["shape"] for row in record["rows"]):
        lines += [f"## {shape}", ""]
        for workload in WORKLOADS:
            rows = [row for row in record["rows"] if (row["shape"], row["workload"]) == (shape, workload)]
            if rows:
                lines += [f"### {workload}", "", *_workload(workload, rows, record), ""]
    lines += _bounds(record) + _profiles(record) + _agreement(record) + _tunings(record)
    for title, texts in (("Failures", record["failures"]), ("Notes", record["notes"])):
        if texts:
            lines += [f"## {title}", "", *(f"- {text}" for text in texts), ""]
    return "\n".join(lines).rstrip() + "\n"


def _head(record: Record) -> list[str]:
    processor = record["processor"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version is not None)
    instructions = ", ".join(processor["instructions"])
    card = f"{processor['card']}, " if "card" in processor else ""
    return [
        "# Our engine beside its peers",
        "",
        f"{record['created']}, {card}{processor['model']} ({processor['cores']} cores, {instructions}), "
        f"{processor['threads_used']} threads for each system. {versions}.",
        "",
        f"    {record['command']}",
        "",
        "Random weights, the same for all; output lengths are forced; one system works at a time, in turns. "
        f"A ratio above 1 is ours ahead: the median over {record['rounds']} rounds (unless the notes say fewer) of "
        "each round's own ratio, with the least and the greatest in brackets where there are several. "
        "Values are medians.",
    ]


def _workload(name: str, rows: Sequence[Record], record: Record) -> list[str]:
    compared = [one for one in record["ratios"] if (one["shape"], one["workload"]) == (rows[0]["shape"], name)]
    lines = _compared(name, compared) if compared else []
    own = _own(name, rows, leave_out_compared=bool(compared))
    return [*lines, *([""] if lines and own else []), *own]


def _compared(name: str, compared: Sequence[Record]) -> list[str]:
    """A line for each case, metric and setting of ours; a column for each peer."""
    peers = list(dict.fromkeys(one["peer"] for one in compared))
    cells: dict[tuple[str, str, str], dict[str, Record]] = {}
    for one in compared:
        cells.setdefault((one["case"], one["metric"], one["setting"]), {})[one["peer"]] = one
    metrics = {metric.name: metric for metric in WORKLOADS[name].metrics}
    lines = [
        "| case | metric | ours | value | " + " | ".join(f"{peer} | ratio" for peer in peers) + " |",
        "|---|---|---|---:|" + "---:|---:|" * len(peers),
    ]
    for (case, metric, setting), found in cells.items():
        first = next(iter(found.values()))
        line = [case, titled(metrics[metric]), setting, number(first["ours"])]
        for peer in peers:
            line += [number(found[peer]["theirs"]), spread(found[peer])] if peer in found else ["", ""]
        lines.append(f"| {' | '.join(line)} |")
    return lines


def _own(name: str, rows: Sequence[Record], *, leave_out_compared: bool) -> list[str]:
    """Figures without a peer's: a line for each case, system and metric."""
    lines = []
    for (_, _, case), group in ratios.grouped(list(map(dict, rows))).items():
        for title in dict.fromkeys((row["system"], row["setting"]) for row in group):
            for metric in WORKLOADS[name].metrics:
                if metric.compared and leave_out_compared:
                    continue
                values = list(ratios.by_round(group, title, metric.name).values())
                if values:
                    middle = number(statistics.median(values))
                    between = f"{number(min(values))} - {number(max(values))}" if len(values) > 1 else ""
                    lines.append(f"| {case} | {titled(metric)} | {' '.join(title)} | {middle} | {between} |")
    return (
        ["| case | metric | system | median | least - greatest |", "|---|---|---|---:|---:|", *lines] if lines else []
    )


def _bounds(record: Record) -> list[str]:
    if not record["bounds"]:
        return []
    rates = record["rates"]
    said = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in rates.items() if name != "memory")
    peers = list(dict.fromkeys(peer for one in record["bounds"] for peer in one["peers"]))
    lines = [
        "## What bounds it",
        "",
        f"The best rates of this processor, measured after the rounds: matrix products {said} (int16, int8: integer "
        f"operations), memory {rates['memory']:,.0f} GB/s. The bound of a case is what its products, and the bytes of "
        "weights and cache that each step must read, take at these rates; nothing else is counted. A peer above 1.00 "
        "is faster than products of that mode can be on this processor, whoever makes them.",
        "",
        "| shape | case | products | bound, tokens/s | ours reaches |" + "".join(f" {peer} |" for peer in peers),
        "|---|---|---|---:|---:|" + "---:|" * len(peers),
    ]
    for one in record["bounds"]:
        shares = "".join(f" {one['peers'][peer]:.2f} |" if peer in one["peers"] else " |" for peer in peers)
        names = f"{one['shape']} | {one['case']} | {one['mode']}"
        lines.append(f"| {names} | {number(one['bound'])} | **{one['reached']:.2f}** |{shares}")
    return [*lines, ""]


def _profiles(record: Record) -> list[str]:
    if not record["profiles"]:
        return []
    lines = [
        "## Where our time goes",
        "",
        "Shares of the seconds of one run (the median of some, after the rounds), as the first thread has them. In "
        "parentheses: of what a part takes, how much it must take at the best rates above, which they only reach where "
        "nobody else uses the machine's memory; 1.00 is the bound. `By row` are norms, activations and copies, "
        "`waiting` is for the other threads, `outside` is all that is no kernel: scheduling, sampling, Python.",
        "",
        "| shape | case | ours | seconds | " + " | ".join(PARTS) + " |",
        "|---|---|---|---:|" + "---:|" * len(PARTS),
    ]
    for one in record["profiles"]:
        cells = [_share(one, part) for part in PARTS]
        names = f"{one['shape']} | {one['case']} | {one['mode']} | {number(one['seconds'])}"
        lines.append(f"| {names} | {' | '.join(cells)} |")
    return [*lines, ""]


def _share(one: Record, part: str) -> str:
    """38% (0.91): a part's share of the run, and how near it is to its bound."""
    seconds, least = one["parts"][part], one["least"].get(part)
    share = f"{seconds / one['seconds']:.0%}"
    return f"{share} ({least / seconds:.2f})" if least is not None and seconds > 0 else share


def _agreement(record: Record) -> list[str]:
    if not record["agreement"]:
        return []
    lines = ["## The same model", "", "Greedy tokens up to the first that differs, and scores, of a few prompts.", ""]
    lines += ["| shape | system | reference | equal tokens | largest score error |", "|---|---|---|---:|---:|"]
    for one in record["agreement"]:
        shares = f"{one['equal_tokens']:.1%} | {one['largest_score_error']:.2g}"
        lines.append(f"| {one['shape']} | {one['system']} | {one['reference']} | {shares} |")
    return [*lines, ""]


def _tunings(record: Record) -> list[str]:
    """Only of systems that had a choice."""
    chosen = [one for one in record["tunings"] if one["offered"] > 1]
    if not chosen:
        return []
    lines = [
        "## Tunings of the peers",
        "",
        "The fastest of what was tried before the rounds, in the time that there was for it.",
        "",
    ]
    lines += ["| shape | workload | case | system | tried | chosen |", "|---|---|---|---|---:|---|"]
    for one in chosen:
        system = f"{one['system']} {one['setting']}"
        names = f"{one['shape']} | {one['workload']} | {one['case']} | {system}"
        lines.append(f"| {names} | {len(one['tried'])} of {one['offered']} | {one['chosen']} |")
    return [*lines, ""]


def titled(metric: Metric) -> str:
    return f"{metric.title}, {metric.unit}"


def spread(one: Record) -> str:
    """The ratio with its least and greatest: **1.52** [1.40, 1.61]."""
    middle = f"**{one['ratio']:.2f}**"
    return f"{middle} [{one['low']:.2f}, {one['high']:.2f}]" if one["rounds"] > 1 else middle


def number(value: float) -> str:
    """Three digits at least, never an exponent.

    >>> [number(value) for value in (1234.5, 98.76, 1.2345, 0.01234)]
    ['1,234', '98.8', '1.23', '0.0123']
    """
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.6f}"
