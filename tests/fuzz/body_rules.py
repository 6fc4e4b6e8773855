"""What a request's body deserves, judged without the server's own reader: the document is the law."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.validators import extend  # type: ignore[import-untyped]

from tests.fuzz.json_bodies import Json, resolve

MAX_DEPTH = 64


def _is_integer(_: object, value: object) -> bool:
    return type(value) is int


# JSON Schema takes 1.0 for an integer; this server does not.
Validator = extend(
    Draft202012Validator, type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
)


@dataclass(frozen=True)
class Judgement:
    """`is_object`: the body is a JSON object. `fits`: it is one that the schema allows. `names`: the fields that a
    refusal may name: the schema's, and the body's own."""

    is_object: bool
    fits: bool
    names: frozenset[str]
    wants_stream: bool = False


class NotJson(ValueError):
    pass


def strict_json(text: str) -> Any:
    """
    Raises:
        NotJson: no JSON by the standard, or a name twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from None


def judge(raw: bytes, schema: Json, document: Json) -> Judgement:
    """What a body is worth under a route's schema."""
    fields = frozenset(schema["properties"])
    for field in schema["properties"].values():
        fields |= frozenset(resolve(field, document).get("properties", ()))
    try:
        value = strict_json(raw.decode("utf-8-sig"))
    except ValueError:
        return Judgement(is_object=False, fits=False, names=fields)
    if not isinstance(value, dict) or _depth(value) > MAX_DEPTH:
        return Judgement(is_object=False, fits=False, names=fields)
    said = _without_null(value, schema)
    return Judgement(
        is_object=True,
        fits=next(Validator(schema).iter_errors(said), None) is None,
        names=fields | frozenset(value),
        wants_stream=value.get("stream") is True,
    )


def _without_null(value: Any, schema: Json) -> Any:
    """null equals absent, for the fields that a schema declares."""
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        return {
            name: _without_null(item, fields.get(name, {}))
            for name, item in value.items()
            if not (item is None and name in fields)
        }
    if isinstance(value, list):
        return [_without_null(item, schema.get("items", {})) for item in value]
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        parts = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
        level = [part for part in parts if isinstance(part, dict | list)]
    return depth


def _once(pairs: list[tuple[str, Any]]) -> Json:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise NotJson("a name stands twice")
    return value


def _no_constant(word: str) -> NoReturn:
    raise NotJson(f"{word} is no JSON")
