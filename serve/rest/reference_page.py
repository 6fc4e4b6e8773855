"""`/docs`: the OpenAPI document as one page that needs no network and no script."""

from __future__ import annotations

import json
from html import escape

from serve.rest.json_text import Json

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c;background:#fff}
h2{margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1rem}code,pre{font:13px/1.45 ui-monospace,monospace}
pre{background:#f5f5f5;padding:.75rem;overflow:auto}table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid #e5e5e5;padding:.3rem .5rem;text-align:left;vertical-align:top}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#161616}pre{background:#222}td,th,h2{border-color:#333}}
"""


def render(document: Json) -> bytes:
    """The page, as HTML."""
    info = document["info"]
    sections = [
        _operation(path, method, operation, document)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])} API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{_prose(info['description'])}</p>"
        f'<p>The same for programs: <a href="openapi.json">openapi.json</a></p>{"".join(sections)}</html>'
    ).encode()


def _operation(path: str, method: str, operation: Json, document: Json) -> str:
    parts = [
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>",
        f"<p>{escape(operation['summary'])}. {_prose(operation.get('description', ''))}</p>",
    ]
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]["application/json"]
        example = json.dumps(body["example"])
        parts.append(f"<pre>curl -s localhost:8000{escape(path)} -d {escape(repr(example))}</pre>")
        parts.append(_fields(_resolve(body["schema"], document)))
    answers = [
        f"<tr><td>{status}</td><td>{_prose(answer['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
    ]
    return "".join([*parts, f"<table><tr><th>status</th><th></th></tr>{''.join(answers)}</table>"])


def _fields(schema: Json) -> str:
    return f"<table><tr><th>field</th><th>type</th><th>meaning</th></tr>{''.join(_rows(schema))}</table>"


def _rows(schema: Json, within: str = "") -> list[str]:
    """One row a field; an object's own fields follow it."""
    rows = []
    for name, field in schema["properties"].items():
        needed = " (required)" if name in schema.get("required", ()) else ""
        kind, meaning = escape(_kind(field)), _prose(field["description"])
        rows.append(f"<tr><td><code>{within}{name}</code>{needed}</td><td>{kind}</td><td>{meaning}</td></tr>")
        if "properties" in field:
            rows += _rows(field, f"{within}{name}.")
    return rows


def _kind(schema: Json) -> str:
    """A field's type and range in words.

    >>> _kind({"type": "integer", "minimum": 0, "maximum": 20}), _kind({"type": "array", "items": {"type": "string"}})
    ('integer 0…20', 'list of string')
    """
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'])}"
    if schema["type"] == "object" and "properties" in schema:
        return "object" if "description" in schema else "{" + ", ".join(schema["properties"]) + "}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None:
        return f"{schema['type']} {low:g}…" + ("" if high is None else f"{high:g}")
    if "exclusiveMinimum" in schema:
        return f"{schema['type']} > {schema['exclusiveMinimum']:g}" + ("" if high is None else f", ≤ {high:g}")
    return str(schema["type"])


def _resolve(schema: Json, document: Json) -> Json:
    found: Json = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _prose(text: str) -> str:
    """Escaped text, with what stands between backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
