"""A report for people: Markdown with its definitions, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.meters import DEFINITIONS
from loadtests.objectives import Verdict

_COLUMNS = (
    ("ttft_ms", "p50"),
    ("ttft_ms", "p95"),
    ("tpot_ms", "p50"),
    ("tpot_ms", "p95"),
    ("itl_ms", "p95"),
    ("e2e_ms", "p50"),
    ("e2e_ms", "p95"),
)


def to_markdown(report: Mapping[str, Any], verdicts: Sequence[Verdict] = (), picture: str | None = None) -> str:
    """The report as Markdown. `picture` is a file name to show."""
    totals, config = report["totals"], report["config"]
    lag = totals["lag_ms"]
    lines = [
        f"# Load test: {config['workload']}, {config['load']}",
        "",
        f"{report['created']}, commit {report['commit']}, {report['machine']['processor']} "
        f"({report['machine']['cores']} cores), server {_describe_server(report['server'])}.",
        f"{totals['requests']} requests ({totals['failed']} failed, {totals['skipped']} arrivals skipped): "
        f"{totals['requests_per_second']:.2f} requests/s, {totals['tokens_per_second']:.1f} tokens/s, "
        f"goodput {totals['goodput']:.2f} requests/s. "
        f"Expected answers: {totals['answers_right']} of {totals['answers_checked']}. "
        + (f"The generator's own lag: p50 {lag['p50']:.1f} ms, p99 {lag['p99']:.1f} ms." if lag else ""),
        "",
        *_table(report),
    ]
    if verdicts:
        lines += ["", "## Objectives", "", "| objective | value | limit | |", "|---|---:|---:|---|"]
        for verdict in verdicts:
            value = "not measured" if verdict.value is None else f"{verdict.value:.4g}"
            lines.append(f"| {verdict.what} | {value} | {verdict.limit} | {'kept' if verdict.kept else '**missed**'} |")
    if report["failures"]:
        lines += ["", "## Failures", "", *(f"- {count} x {text}" for text, count in report["failures"].items())]
    if picture is not None:
        lines += ["", f"![latencies and throughput]({picture})"]
    lines += ["", "## Definitions", "", *(f"- **{name}**: {text}." for name, text in DEFINITIONS.items())]
    return "\n".join(lines) + "\n"


def _table(report: Mapping[str, Any]) -> list[str]:
    names = [f"{metric.removesuffix('_ms').upper()} {percentile}" for metric, percentile in _COLUMNS]
    lines = [
        "| | requests | failed | tokens | " + " | ".join(names) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(names),
    ]
    rows = [(f"{row['protocol']} {row['shape']} {row['mode']}", row) for row in report["rows"]]
    for name, row in [*rows, ("**all**", report["totals"])]:
        cells = [_cell(row["metrics"][metric], percentile) for metric, percentile in _COLUMNS]
        counts = f"{row['requests']} | {row['failed']} | {row['completion_tokens']}"
        lines.append(f"| {name} | {counts} | " + " | ".join(cells) + " |")
    return [*lines, "", "Times in milliseconds."]


def _cell(summary: Mapping[str, float] | None, percentile: str) -> str:
    return "" if summary is None else f"{summary[percentile]:.1f}"


def _describe_server(server: Mapping[str, Any] | None) -> str:
    if not server:
        return "unknown"
    return ", ".join(str(server[key]) for key in ("id", "runtime", "dtype") if server.get(key) is not None)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Left: the share of requests that was faster than x. Right: when each request ended and how long it took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    requests = [request for request in report["requests"] if request["error"] is None]
    figure, (shares, course) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for protocol, colour in (("rest", "tab:blue"), ("grpc", "tab:orange")):
        own = [request for request in requests if request["protocol"] == protocol]
        if not own:
            continue
        for key, style in (("ttft_ms", "--"), ("e2e_ms", "-")):
            values = sorted(request[key] for request in own if request[key] is not None)
            share = [(number + 1) / len(values) for number in range(len(values))]
            shares.plot(values, share, style, color=colour, label=f"{protocol} {key.removesuffix('_ms').upper()}")
        ends = [(request["started_ms"] + request["e2e_ms"]) / 1000 for request in own]
        course.scatter(ends, [request["e2e_ms"] for request in own], s=8, color=colour, label=protocol)
    shares.set(
        xlabel="milliseconds",
        ylabel="share of requests",
        xscale="log",
        ylim=(0, 1),
        title="How many were faster than x",
    )
    course.set(xlabel="second of the run", ylabel="E2E, milliseconds", title="Requests as they ended")
    course.set_ylim(bottom=0)
    shares.xaxis.set_major_formatter("{x:g}")
    shares.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    shares.xaxis.set_minor_formatter(ticker.NullFormatter())
    for axes in (shares, course):
        axes.grid(alpha=0.3)
        if requests:
            axes.legend()
    totals = report["totals"]
    figure.suptitle(
        f"{report['config']['workload']}, {report['config']['load']}: {totals['requests_per_second']:.1f} requests/s, "
        f"{totals['tokens_per_second']:.0f} tokens/s"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
