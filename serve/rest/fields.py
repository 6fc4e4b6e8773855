"""Declared fields: a table says what a JSON object may hold; `parse` reads by it and `to_schema` shows it in OpenAPI.

Nothing is ever converted: "false" is no boolean, 1.0 no integer, true no number. null is the same as absent.
Types are checked here. Ranges are the service's to check, with one wording for both protocols; the tables know them
to show them (a test asks the service whether they are right).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from serve.errors import InvalidRequest, UnknownField
from serve.rest.json_text import Json, shown, to_param, type_name
from serve.sampling_params import INT64_MAX, INT64_MIN

_NEAREST_CUTOFF = 0.5


class Kind(Protocol):
    """What values a field may have."""

    def parse(self, name: str, value: Any) -> Any:
        """The value, checked (never null).

        Raises:
            InvalidRequest: naming the field.
        """
        ...

    def to_schema(self) -> Json:
        """The same as JSON schema."""
        ...


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an object: its kind, and what it means in a sentence."""

    kind: Kind
    help: str
    required: bool = False


Table = Mapping[str, Field]


def parse(table: Table, body: Json, *, ignore_unknown: bool = False) -> Json:
    """The fields that `body` says, checked. Absent and null ones are left out.

    Raises:
        InvalidRequest: a wrong value, a required field that is not there, an unknown field (with the nearest match).
    """
    if not ignore_unknown:
        for name in body:
            if name not in table:
                raise UnknownField(f"unknown field {shown(name)}{nearest(name, table)}", field=to_param(name))
    values = {}
    for name, field in table.items():
        value = body.get(name)
        if value is not None:
            values[name] = field.kind.parse(name, value)
        elif field.required:
            raise InvalidRequest(f"{name} is required", field=name)
    return values


def to_schema(table: Table, *, is_open: bool = False) -> Json:
    """The table as JSON schema; `is_open` where unknown fields are ignored."""
    properties = {name: {**field.kind.to_schema(), "description": field.help} for name, field in table.items()}
    schema: Json = {"type": "object", "properties": properties}
    required = [name for name, field in table.items() if field.required]
    if required:
        schema["required"] = required
    if not is_open:
        schema["additionalProperties"] = False
    return schema


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """
    >>> nearest("max_new_tokens", ["max_tokens", "stop"])
    "; did you mean 'max_tokens'?"
    """
    close = difflib.get_close_matches(name[:64], list(known), n=1, cutoff=_NEAREST_CUTOFF)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse(where: str, wanted: str, value: Any) -> NoReturn:
    """Say what a place takes and what it was given."""
    raise InvalidRequest(f"{where} must be {wanted}, not {type_name(value)}", field=field_of(where))


def field_of(where: str) -> str:
    """The field that a place is in.

    >>> field_of("messages[2].role"), field_of("stop[0]"), field_of("n")
    ('messages', 'stop', 'n')
    """
    return where.partition("[")[0].partition(".")[0]


@dataclass(frozen=True, slots=True)
class Text:
    def parse(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            refuse(name, "a string", value)
        return value

    def to_schema(self) -> Json:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class Flag:
    def parse(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            refuse(name, "true or false", value)
        return value

    def to_schema(self) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Integer:
    """A 64-bit integer. The range is shown in the schema, and only checked here where it is `enforced`."""

    low: int = INT64_MIN
    high: int = INT64_MAX
    enforced: bool = False

    def parse(self, name: str, value: Any) -> int:
        if type(value) is not int:
            if isinstance(value, float):
                raise InvalidRequest(f"{name} must be an integer, not {value}", field=name)
            refuse(name, "an integer", value)
        if not INT64_MIN <= value <= INT64_MAX:
            raise InvalidRequest(f"{name} must be a 64-bit integer", field=name)
        if self.enforced and not self.low <= value <= self.high:
            bounds = f"at least {self.low}" if self.high == INT64_MAX else f"between {self.low} and {self.high}"
            raise InvalidRequest(f"{name} must be {bounds}, not {value}", field=name)
        return value

    def to_schema(self) -> Json:
        schema: Json = {"type": "integer"}
        if self.low > INT64_MIN:
            schema["minimum"] = self.low
        if self.high < INT64_MAX:
            schema["maximum"] = self.high
        return schema if len(schema) > 1 else {**schema, "format": "int64"}


@dataclass(frozen=True, slots=True)
class Number:
    """A number. The range, without `low` itself where `excludes_low`, is shown in the schema, not checked."""

    low: float
    high: float = math.inf
    excludes_low: bool = False

    def parse(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(name, "a number", value)
        try:
            return float(value)
        except OverflowError:
            raise InvalidRequest(f"{name} must be a finite number", field=name) from None

    def to_schema(self) -> Json:
        schema: Json = {"type": "number", "exclusiveMinimum" if self.excludes_low else "minimum": self.low}
        if not math.isinf(self.high):
            schema["maximum"] = self.high
        return schema


@dataclass(frozen=True, slots=True)
class Word:
    """One of a closed list of words."""

    words: tuple[str, ...]

    def parse(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            refuse(name, f"one of {', '.join(self.words)}", value)
        if value not in self.words:
            hint = nearest(value, self.words)
            raise InvalidRequest(f"{name} must be one of {', '.join(self.words)}, not {shown(value)}{hint}", field=name)
        return value

    def to_schema(self) -> Json:
        return {"type": "string", "enum": list(self.words)}


@dataclass(frozen=True, slots=True)
class Texts:
    """A list of strings; with `or_one` also a string by itself. How many is the service's to judge; `most` is shown."""

    or_one: bool = False
    most: int | None = None

    def parse(self, name: str, value: Any) -> tuple[str, ...]:
        if self.or_one and isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            refuse(name, "a string or a list of strings" if self.or_one else "a list of strings", value)
        for index, item in enumerate(value):
            if not isinstance(item, str):
                refuse(f"{name}[{index}]", "a string", item)
        return tuple(value)

    def to_schema(self) -> Json:
        texts: Json = {"type": "array", "items": {"type": "string"}}
        if self.most is not None:
            texts["maxItems"] = self.most
        return {"anyOf": [{"type": "string"}, texts]} if self.or_one else texts


@dataclass(frozen=True, slots=True)
class Object:
    """An object with fields of its own."""

    table: Table
    ignore_unknown: bool = False

    def parse(self, name: str, value: Any) -> Json:
        if not isinstance(value, dict):
            refuse(name, "an object", value)
        try:
            return parse(self.table, value, ignore_unknown=self.ignore_unknown)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name}: {error.message}", field=field_of(name)) from None

    def to_schema(self) -> Json:
        return to_schema(self.table, is_open=self.ignore_unknown)


@dataclass(frozen=True, slots=True)
class Objects:
    """A list of objects of one kind."""

    item: Object

    def parse(self, name: str, value: Any) -> list[Json]:
        if not isinstance(value, list):
            refuse(name, "a list of objects", value)
        return [self.item.parse(f"{name}[{index}]", item) for index, item in enumerate(value)]

    def to_schema(self) -> Json:
        return {"type": "array", "items": self.item.to_schema()}


@dataclass(frozen=True, slots=True)
class Bias:
    """Token id, as the string that JSON makes of a key, to a number."""

    most: float

    def parse(self, name: str, value: Any) -> dict[int, float]:
        if not isinstance(value, dict):
            refuse(name, "an object of token ids and numbers", value)
        bias = {}
        number = Number(-self.most, self.most)
        for key, item in value.items():
            if not (key.isascii() and key.isdecimal() and len(key) <= 18):
                raise InvalidRequest(f"{name} must have token ids as its names, not {shown(key)}", field=name)
            bias[int(key)] = number.parse(name, item)
        return bias

    def to_schema(self) -> Json:
        number = {"type": "number", "minimum": -self.most, "maximum": self.most}
        return {"type": "object", "additionalProperties": number, "propertyNames": {"pattern": "^[0-9]+$"}}
