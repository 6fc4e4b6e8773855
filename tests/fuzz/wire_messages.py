"""Protobuf messages as bytes, from their descriptors: valid ones, extremes, and what no writer would write."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.fuzz.chances import one_in, rarely
from tests.fuzz.json_bodies import SMALL, TEXTS, mutated

Wire = tuple[int, bytes]  # a wire type, and a value as it is written

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_INTEGERS = (0, 1, -1, 2, 3, 17, 21, 65, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**64 - 1)
_DOUBLES = (0.0, -0.0, 1.0, 2.0, 2.5, -1.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 100.0, 100.5)
_STRINGS = (
    b"",
    b" ",
    b"a\0b",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc3",
    "é".encode(),
    b"x" * 5000,
    b"the " * 2000,
    b"\xf4\x90\x80\x80",
)
_ODD_VARINTS = (b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 9 + b"\x00", b"\x80", b"\x80\x80\x80\x80\x10")

# Usual values by the field's name, so that most requests reach the model.
_HINTS: Mapping[str, SearchStrategy[Any]] = {
    "mode": st.integers(0, 4),
    "answer_format": st.integers(0, 2),
    "model": st.sampled_from(["default", "tgi", "dummy"]),
    "request_id": st.sampled_from(["mine", "a.b:c-d_1", "x" * 128]),
    "n": SMALL,
    "samples": SMALL,
    "max_tokens": st.integers(1, 12),
    "min_tokens": st.integers(0, 2),
    "temperature": st.sampled_from([0.0, 0.7, 1.0, 1e-9]),
    "top_p": st.sampled_from([0.5, 1.0]),
    "repetition_penalty": st.sampled_from([0.9, 1.0, 1.3]),
    "logprobs": st.integers(0, 20),
    "key": st.integers(3, 60),
    "value": st.floats(-100, 100),
}


def varint(number: int) -> bytes:
    """An integer as protobuf writes it, negative ones as 64 bits."""
    number &= 2**64 - 1
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def field(number: int, wire: Wire) -> bytes:
    """A field as it stands in a message."""
    kind, value = wire
    return varint(number << 3 | kind) + (varint(len(value)) + value if kind == LENGTH else value)


def messages(descriptor: Descriptor) -> SearchStrategy[bytes]:
    """Messages of a type: mostly well-formed, often with an extreme or an unknown field, sometimes garbage."""
    well_formed = _well_formed(descriptor)

    @st.composite
    def drawn(draw: DrawFn) -> bytes:
        if draw(one_in(25)):
            return draw(st.binary(max_size=60))
        raw = draw(well_formed)
        if draw(one_in(8)):
            raw += draw(_stray_fields())
        return draw(mutated(raw)) if draw(one_in(8)) else raw

    return drawn()


def _well_formed(descriptor: Descriptor) -> SearchStrategy[bytes]:
    """The fields of a type: those that a request needs nearly always, a few of the others, in any order."""
    by_name = {item.name: _values(item) for item in descriptor.fields}
    numbers = {item.name: item.number for item in descriptor.fields}
    needed = sorted(set(by_name) & {"instruction", "text", "candidates", "input", "output", "key", "value"})
    names = sorted(by_name)

    @st.composite
    def drawn(draw: DrawFn) -> bytes:
        chosen = [name for name in needed if not draw(one_in(20))]
        if names:  # a scalar that comes twice counts as it came last
            chosen += draw(st.lists(st.sampled_from(names), max_size=4))
        return b"".join(field(numbers[name], draw(by_name[name])) for name in chosen)

    return drawn()


def _values(item: FieldDescriptor) -> SearchStrategy[Wire]:
    """Values of a field: usual ones, extremes of its type, and once in a while one of another wire type."""
    usual, extreme = _of_type(item)
    return rarely(rarely(usual, extreme, 10), _stray_values(), 60)


def _of_type(item: FieldDescriptor) -> tuple[SearchStrategy[Wire], SearchStrategy[Wire]]:
    """(usual, extreme) values."""
    hint = _HINTS.get(item.name)
    if item.type == FieldDescriptor.TYPE_MESSAGE:
        assert item.message_type is not None
        inner = _well_formed(item.message_type).map(lambda raw: (LENGTH, raw))
        return inner, st.binary(max_size=20).map(lambda raw: (LENGTH, raw))
    if item.type == FieldDescriptor.TYPE_STRING:
        texts = (TEXTS if hint is None else hint).map(lambda text: (LENGTH, text.encode()))
        return texts, st.sampled_from(_STRINGS).map(lambda raw: (LENGTH, raw))
    if item.type == FieldDescriptor.TYPE_DOUBLE:
        doubles = (st.floats(0, 2) if hint is None else hint).map(lambda number: (FIXED64, struct.pack("<d", number)))
        return doubles, st.sampled_from(_DOUBLES).map(lambda number: (FIXED64, struct.pack("<d", number)))
    if item.type == FieldDescriptor.TYPE_BOOL:
        hint = st.integers(0, 1)
    integers = (st.integers(0, 5) if hint is None else hint).map(lambda number: (VARINT, varint(number)))
    extremes = st.sampled_from(_INTEGERS).map(varint) | st.sampled_from(_ODD_VARINTS)
    return integers, extremes.map(lambda raw: (VARINT, raw))


def _stray_values() -> SearchStrategy[Wire]:
    return st.one_of(
        st.integers(0, 2**64 - 1).map(lambda number: (VARINT, varint(number))),
        st.binary(min_size=8, max_size=8).map(lambda raw: (FIXED64, raw)),
        st.binary(min_size=4, max_size=4).map(lambda raw: (FIXED32, raw)),
        st.binary(max_size=12).map(lambda raw: (LENGTH, raw)),
    )


@st.composite
def _stray_fields(draw: DrawFn) -> bytes:
    """Fields that the type does not have, groups and field 0 among them."""
    number = draw(st.sampled_from([0, 13, 99, 1000, 19000, 2**29 - 1, 2**31]))
    kind = draw(st.sampled_from(["value", "value", "group", "end", "reserved", "deep"]))
    if kind == "value":
        return field(number, draw(_stray_values()))
    if kind == "group":
        return varint(number << 3 | 3) + varint(number << 3 | 4)
    if kind == "deep":
        return varint(99 << 3 | 3) * 200 + varint(99 << 3 | 4) * 200
    return varint(number << 3 | (4 if kind == "end" else 6))
