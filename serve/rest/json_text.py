"""JSON to and from bytes: a strict reader of request bodies, a compact writer of responses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn

from serve.errors import InvalidRequest, UnknownField

Json = dict[str, Any]

MAX_DEPTH = 64  # objects and lists inside each other; the deepest request of the contract has 5
# What a body's values may weigh together (`_weight`). Python reads JSON under the interpreter's lock: without a bound,
# 8 MB of empty lists would stop the whole process for seconds. A million token ids are allowed, any text is.
MAX_WEIGHT = 1_000_000
_SMALL_BODY_BYTES = 64 * 1024  # needs no weighing
_SHOWN_NAME_CHARACTERS = 64


def parse_object(raw: bytes) -> Json:
    """The object that a request body holds.

    Stricter than Python's own reader: no NaN or Infinity, no name twice in one object, a bound on nesting.

    Raises:
        InvalidRequest: saying what is wrong and where.
    """
    try:
        text = raw.decode("utf-8-sig")  # some shells put a byte order mark in front
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None
    if not text.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    if len(raw) > _SMALL_BODY_BYTES and _weight(raw) > MAX_WEIGHT:
        raise InvalidRequest("the body has too many values; send several requests")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidRequest(f"the body is not valid JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # the one left: an integer of more digits than Python reads
        raise InvalidRequest("the body is not valid JSON: a number has too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type_name(value)}")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def dump(value: Any) -> bytes:
    """Compact JSON, readable UTF-8. The texts in it are the service's, so they are well-formed."""
    return _WRITER.encode(value).encode()


def dump_ascii(value: Any) -> bytes:
    """Compact JSON in ASCII: what may quote a client (a lone surrogate has no UTF-8), and what is read line by line
    (many clients split lines at U+2028 or U+0085 too, or guess Latin-1)."""
    return _ASCII_WRITER.encode(value).encode()


def dump_with(body: Json, name: str, items: Iterable[Json]) -> bytes:
    """`{**body, name: [*items]}`, written item by item: the interpreter's lock is free between two of them.

    >>> dump_with({"a": 1}, "b", [{}, {}])
    b'{"a":1,"b":[{},{}]}'
    """
    return b'%s,"%s":[%s]}' % (dump(body)[:-1], name.encode(), b",".join(map(dump, items)))


def type_name(value: Any) -> str:
    """What a JSON value is, in words.

    >>> type_name(None), type_name(True), type_name(1), type_name("x"), type_name([])
    ('null', 'a boolean', 'a number', 'a string', 'a list')
    """
    if value is None:
        return "null"
    for kind, name in ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return "an object"


def shown(name: str) -> str:
    """A client's word as a message may quote it: short, in quotes, every odd character escaped."""
    return repr(name[:_SHOWN_NAME_CHARACTERS])


def to_param(name: str) -> str | None:
    """A client's word as an error's field: short, and none with odd characters."""
    return name[:_SHOWN_NAME_CHARACTERS] if name.isprintable() else None


def _weight(raw: bytes) -> int:
    """About how many token ids would cost as much to read: a string weighs 4, a list or an object 10.

    Counted on what stands outside of strings, without a loop over it.

    >>> _weight(b'{"ids": [1, 2], "text": "[a, b, \\\\" c]"}')
    34
    """
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_strings = bare.count(b'"') // 2
    if 4 * num_strings > MAX_WEIGHT:
        return 4 * num_strings
    outside = b"".join(bare.split(b'"')[::2])
    return outside.count(b",") + 4 * num_strings + 10 * (outside.count(b"[") + outside.count(b"{"))


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise UnknownField(f"the body has {shown(name)} twice", field=to_param(name))
            seen.add(name)
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise InvalidRequest(f"the body is not valid JSON: {word} is no JSON number")


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested too deeply; {MAX_DEPTH} levels are allowed")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_WRITER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ASCII_WRITER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
