"""The REST reference's tables: routes, fields and errors, from the OpenAPI document and the table of statuses."""

from __future__ import annotations

from typing import Any

from docs.tables import rpc
from docs.tables.markdown import code, split_default, table
from serve.rest.errors import STATUSES, TGI_TYPES
from serve.rest.schema import openapi_document

Json = dict[str, Any]

_DOCUMENT: Json = openapi_document("", has_keys=True)
# Kinds that are no answer to a request: nobody is left to read the one, and no code raises the other.
_UNSEEN = {"cancelled", "error"}
# Which message of the gRPC contract says what the fields of a JSON object mean.
_TWINS = {
    "GenerateResponse": "GenerateResponse",
    "Output": "Output",
    "TokenLogprob": "TokenLogprob",
    "Usage": "Usage",
    "Timings": "Timings",
    "ScoreResponse": "ScoreResponse",
    "TokenizeResponse": "TokenizeResponse",
}
_NESTED_TWINS = {"votes": "Vote", "candidates": "CandidateScore"}


def routes() -> str:
    """Every route of the OpenAPI document."""
    rows = []
    for path, operations in _DOCUMENT["paths"].items():
        for method, operation in operations.items():
            key = "no" if operation.get("security") == [] else "yes"
            rows.append([code(f"{method.upper()} {path}"), operation["summary"], key])
    return table(["route", "does", "key"], rows)


def request_fields(name: str) -> str:
    """The fields of a request schema: type and range, default, meaning."""
    return table(["field", "type and range", "default", "meaning"], _field_rows(_schema(name)))


def response_fields(name: str) -> str:
    """The fields of a native response, in the words of its twin in the gRPC contract."""
    return table(["field", "type", "meaning"], _answer_rows(_schema(name), _TWINS[name]))


def errors() -> str:
    """Every kind of error, with its place in each schema."""
    words = _DOCUMENT["paths"]["/v1/generate"]["post"]["responses"]
    rows = []
    for kind, (status, type_) in STATUSES.items():
        if kind not in _UNSEEN:
            meaning = words.get(str(status), {"description": "The path takes another method (header Allow)."})
            rows.append([str(status), code(kind), code(type_), code(TGI_TYPES.get(kind, kind)), meaning["description"]])
    return table(["status", "`code`", "`type`", "`error_type` (TGI)", "when"], rows)


def _schema(name: str) -> Json:
    found: Json = _DOCUMENT["components"]["schemas"][name]
    return found


def _field_rows(schema: Json, within: str = "") -> list[list[str]]:
    rows = []
    for name, field in schema["properties"].items():
        meaning, default = split_default(field["description"])
        needed = "**required**" if name in schema.get("required", ()) else default
        rows.append([code(within + name), _kind(field), needed, meaning])
        inner = field.get("items", field)
        if "properties" in inner and "description" in next(iter(inner["properties"].values())):
            rows += _field_rows(inner, f"{within}{name}{'[]' if 'items' in field else ''}.")
    return rows


def _answer_rows(schema: Json, twin: str, within: str = "") -> list[list[str]]:
    comments = rpc.field_comments(twin)
    rows = []
    for name, field in schema["properties"].items():
        inner = field.get("items", {})
        kind, meaning = _kind(field), comments[name].replace("MODE_COT", "Mode `cot`")
        if "null" in kind:  # JSON says what protobuf leaves out
            meaning = meaning.replace("Absent", "null").replace("absent", "null")
        rows.append([code(within + name), kind, meaning])
        if "properties" in inner and name in _NESTED_TWINS:
            rows += _answer_rows(inner, _NESTED_TWINS[name], f"{within}{name}[].")
    return rows


def _kind(schema: Json) -> str:
    """A field's type and range in words.

    >>> _kind({"type": "integer", "minimum": 0, "maximum": 20}), _kind({"type": "array", "items": {"type": "string"}})
    ('integer 0…20', 'list of string')
    """
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(code(word) for word in schema["enum"])
    if schema["type"] == "array":
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {_kind(schema['items'])}{most}"
    if "additionalProperties" in schema and isinstance(schema["additionalProperties"], dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    return str(schema["type"]) + _range(schema)


def _range(schema: Json) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        return f" > {schema['exclusiveMinimum']:g}" + ("" if high is None else f", ≤ {high:g}")
    if low is None:
        return ", 64 bit" if schema.get("format") == "int64" else ""
    return f" ≥ {low:g}" if high is None else f" {low:g}…{high:g}"
