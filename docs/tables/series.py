"""The metrics reference's tables: every series, from a registry on which everything was seen once."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from docs.tables.markdown import code, table
from serve.metrics import NO_MODE, Metrics, Outcome, Protocol, Route
from serve.request import Mode
from serve.runtimes.base import StepStats

_SUFFIXES = {"counter": "_total"}


def series() -> str:
    """Name, kind, labels and meaning of each."""
    rows = [
        [code(family.name + _SUFFIXES.get(family.type, "")), family.type, _labels(family), family.documentation]
        for family in _families()
    ]
    return table(["series", "kind", "labels", "meaning"], rows)


def buckets() -> str:
    """The upper bounds of each histogram's buckets."""
    rows = []
    for family in _families():
        bounds = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
        if bounds:
            rows.append([code(family.name), ", ".join(_number(bound) for bound in dict.fromkeys(bounds))])
    return table(["histogram", "buckets, up to"], rows)


def label_values() -> str:
    """The closed sets that label values come from."""
    modes = [*(mode.value for mode in Mode), NO_MODE]
    closed: dict[str, Iterable[str]] = {
        "protocol": list(Protocol),
        "route": list(Route),
        "mode": modes,
        "outcome": list(Outcome),
        "phase": ["encode", "decode"],
    }
    return table(["label", "values"], [[code(name), ", ".join(map(code, values))] for name, values in closed.items()])


def _families() -> Iterable[Metric]:
    """Ours and the aliases, each with at least one sample."""
    metrics = Metrics()
    metrics.track(Protocol.REST, Route.GENERATE).finish(Outcome.STOP)
    metrics.observe_step(StepStats(encode_tokens=1, decode_sequences=1, cache_usage=(("self", 0.0),)))
    metrics.describe_model(dict.fromkeys(("model", "architecture", "runtime", "device", "dtype"), ""))
    return list(metrics.registry.collect())


def _labels(family: Metric) -> str:
    names = dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le")
    return ", ".join(code(name) for name in names)


def _number(bound: str) -> str:
    return "∞" if bound == "+Inf" else f"{float(bound):g}"
