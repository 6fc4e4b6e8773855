"""A run's record as a picture: ratios with their spread, throughput by concurrency, memory by tokens in flight."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loadtests.bench import ratios
from loadtests.bench.profiles import PARTS
from loadtests.bench.workloads.registry import WORKLOADS

Record = Mapping[str, Any]
_COLOURS = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_LINE_INCHES = 0.22  # height of one line of ratios


def draw(record: Record, path: Path) -> None:
    """Write a PNG with a panel for every shape that has something to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[float, Callable[[Any], None]]] = []
    for shape in dict.fromkeys(row["shape"] for row in record["rows"]):
        compared = [one for one in record["ratios"] if one["shape"] == shape and _is_first(one)]
        if compared:
            lines = len({_label(one) for one in compared}) * len({one["peer"] for one in compared})
            panels.append((1.4 + _LINE_INCHES * lines, partial(_ratios, compared=compared, shape=shape)))
        own = [one for one in record["profiles"] if one["shape"] == shape]
        if own:
            panels.append((1.8 + _LINE_INCHES * len(own), partial(_profiles, records=own, shape=shape)))
        for workload, panel in (("scaling", _scaling), ("memory", _memory)):
            rows = [row for row in record["rows"] if (row["shape"], row["workload"]) == (shape, workload)]
            if rows:
                panels.append((3.5, partial(panel, rows=rows, shape=shape)))
    heights = [height for height, _ in panels] or [1.0]
    figure, grid = pyplot.subplots(
        len(heights), 1, figsize=(10, sum(heights) + 0.5), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axes, (_, panel_of) in zip(grid[:, 0], panels, strict=False):
        panel_of(axes)
    if not panels:
        grid[0, 0].set_axis_off()
        grid[0, 0].text(0.5, 0.5, "nothing to compare", ha="center")
    processor = record["processor"]
    figure.suptitle(f"{processor.get('card', processor['model'])}, {processor['threads_used']} threads")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _is_first(one: Record) -> bool:
    """Whether it is the workload's own metric: the picture shows one for each."""
    return bool(one["metric"] == WORKLOADS[one["workload"]].metrics[0].name)


def _label(one: Record) -> str:
    return f"{one['workload']}: {one['case']} ({one['setting']})"


def _ratios(axes: Any, compared: Sequence[Record], shape: str) -> None:
    """A line for each case and setting of ours, a dot with its spread for each peer."""
    from matplotlib import ticker

    labels = list(dict.fromkeys(map(_label, compared)))
    peers = list(dict.fromkeys(one["peer"] for one in compared))
    for place, peer in enumerate(peers):
        own = [one for one in compared if one["peer"] == peer]
        shift = 0.6 * ((place + 0.5) / len(peers) - 0.5)
        heights = [labels.index(_label(one)) + shift for one in own]
        values = [one["ratio"] for one in own]
        reach = [[one["ratio"] - one["low"] for one in own], [one["high"] - one["ratio"] for one in own]]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.errorbar(values, heights, xerr=reach, fmt="o", markersize=4, capsize=2, color=colour, label=peer)
        for value, height in zip(values, heights, strict=True):
            axes.annotate(f"{value:.2f}", (value, height), xytext=(6, 2), textcoords="offset points", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.2) * 1.1)
    axes.set(title=f"{shape}: ours against each peer", xlabel="ratio; right of 1 is ours ahead")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)


def _profiles(axes: Any, records: Sequence[Record], shape: str) -> None:
    """A bar for each case and mode: the shares of our time, and how much of it the bound leaves."""
    from matplotlib import pyplot

    labels = [f"{one['workload']}: {one['case']} ({one['mode']})" for one in records]
    starts = [0.0] * len(records)
    colours = pyplot.get_cmap("tab20")
    for place, part in enumerate(PARTS):
        shares = [100 * one["parts"][part] / one["seconds"] for one in records]
        axes.barh(range(len(records)), shares, left=starts, height=0.7, color=colours(place), label=part)
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    bounds = [100 * sum(one["least"].values()) / one["seconds"] for one in records]
    axes.plot(bounds, range(len(records)), "k|", markersize=9, markeredgewidth=2, label="the bound")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set(title=f"{shape}: where our time goes", xlabel="% of a run")
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.5 / max(1, 0.25 * len(records))))


def _scaling(axes: Any, rows: Sequence[Record], shape: str) -> None:
    """Throughput of every system against the requests in progress."""
    curves: dict[str, dict[int, float]] = {}
    for (_, _, case), group in ratios.grouped(list(map(dict, rows))).items():
        for title in dict.fromkeys((row["system"], row["setting"]) for row in group):
            values = ratios.by_round(group, title, "tokens_per_second").values()
            curves.setdefault(" ".join(title), {})[int(case.split()[0])] = statistics.median(values)
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), "o-", markersize=4, label=name)
    ticks = sorted({x for curve in curves.values() for x in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set(title=f"{shape}: throughput", xlabel="requests in progress", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _memory(axes: Any, rows: Sequence[Record], shape: str) -> None:
    """Our resident memory against tokens in flight."""
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row["metrics"] for row in rows if row["setting"] == setting and "tokens_in_flight" in row["metrics"]]
        points = sorted((one["tokens_in_flight"], one["resident"]) for one in own)
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=4, label=f"ours {setting}")
    axes.set(title=f"{shape}: memory", xlabel="tokens in flight", ylabel="resident, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
