"""Schemas of the operator's objects, for the fields that we use and no others: a field beyond these fails.

Taken from prometheus-operator's CRDs (monitoring.coreos.com/v1): names, types and the two duration patterns. They are
stricter than the CRDs in that an unknown field is an error, where a cluster would drop it silently. Checked once
against the full ones: npm @kubernetes-models/prometheus-operator 6.0.0, `new PodMonitor(object).validate()`.
"""

from __future__ import annotations

from typing import Any

_DURATION = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
    "minLength": 1,
}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _object(("name",), name={"type": "string"}, namespace={"type": "string"}, labels=_STRINGS)
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


_ENDPOINT = _object(
    ("port",),
    port={"type": "string"},
    path={"type": "string"},
    scheme={"enum": ["http", "https", "HTTP", "HTTPS"]},
    interval=_DURATION,
    scrapeTimeout=_DURATION,
)
_RULE = _object(
    ("alert", "expr"),
    alert={"type": "string"},
    expr={"type": "string"},
    labels=_STRINGS,
    annotations=_STRINGS,
    **{"for": _DURATION},
)
_GROUP = _object(("name", "rules"), name={"type": "string"}, rules={"type": "array", "items": _RULE, "minItems": 1})

CRD_SCHEMAS = {
    "PodMonitor": _resource(
        "PodMonitor",
        _object(
            ("selector", "podMetricsEndpoints"),
            selector=_object((), matchLabels=_STRINGS),
            podMetricsEndpoints={"type": "array", "items": _ENDPOINT, "minItems": 1},
        ),
    ),
    "PrometheusRule": _resource("PrometheusRule", _object((), groups={"type": "array", "items": _GROUP})),
}
