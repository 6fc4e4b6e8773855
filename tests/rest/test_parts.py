"""The small parts by themselves: worked examples, JSON, fields, offsets."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.output import TextLogprob
from serve.rest.fields import Field, Integer, Object, Objects, Text, parse
from serve.rest.json_text import MAX_DEPTH, MAX_WEIGHT, dump, dump_ascii, dump_with, parse_object
from serve.rest.text_offsets import Placed, TextOffsets


def test_every_worked_example_holds() -> None:
    names = ["errors", "json_text", "fields", "sse", "protocol", "openai_responses", "reference_page"]
    ran = [doctest.testmod(importlib.import_module(f"serve.rest.{name}")) for name in names]
    assert [result.failed for result in ran] == [0] * len(names)
    assert all(result.attempted >= 1 for result in ran)


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(_TEXTS, inner),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(_TEXTS, _JSON))
def test_what_is_written_is_read(value: dict[str, Any]) -> None:
    assert parse_object(dump(value)) == value
    assert parse_object(dump_ascii(value)) == value
    assert dump_ascii(value).isascii()


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_an_object_or_a_mistake(raw: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse_object(raw), dict)


def test_bounds_of_a_body() -> None:
    def nest(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert parse_object(nest(MAX_DEPTH))
    with pytest.raises(InvalidRequest, match="nested"):
        parse_object(nest(MAX_DEPTH + 1))
    text = '[{"a": 1}, "\\\\' * 100_000  # brackets and commas in a text weigh nothing
    assert parse_object(json.dumps({"a": text}).encode())["a"] == text
    assert len(parse_object(json.dumps({"a": [1] * (MAX_WEIGHT - 100)}).encode())["a"]) == MAX_WEIGHT - 100
    lists: list[list[Any]] = [
        [1] * (MAX_WEIGHT + 1),
        [[]] * (MAX_WEIGHT // 10),
        ["x"] * (MAX_WEIGHT // 4),
        [{}] * 100_000,
    ]
    for heavy in lists:
        with pytest.raises(InvalidRequest, match="too many values"):
            parse_object(json.dumps({"a": heavy}).encode())


def test_a_response_written_item_by_item() -> None:
    items: list[dict[str, Any]] = [{"a": 1}, {"b": "é"}]
    assert json.loads(dump_with({"x": [1]}, "items", items)) == {"x": [1], "items": items}
    assert json.loads(dump_with({"x": 1}, "items", [])) == {"x": 1, "items": []}


def test_fields_inside_fields() -> None:
    inner = Object({"count": Field(Integer(1, 5, enforced=True), "", required=True), "name": Field(Text(), "")})
    table = {"items": Field(Objects(inner), ""), "item": Field(inner, "")}
    assert parse(table, {"items": [{"count": 1, "name": None}], "item": None}) == {"items": [{"count": 1}]}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"items": [{"count": 1}, {"count": 6}]}, "items[1]: count must be between 1 and 5, not 6", "items"),
        ({"items": [{}]}, "items[0]: count is required", "items"),
        ({"items": {"count": 1}}, "items must be a list of objects, not an object", "items"),
        ({"items": [1]}, "items[0] must be an object, not a number", "items"),
        ({"item": {"count": 1, "nam": "x"}}, "item: unknown field 'nam'; did you mean 'name'?", "item"),
        ({"nam": []}, "unknown field 'nam'", "nam"),
    ]
    for body, message, field in cases:
        with pytest.raises(InvalidRequest) as caught:
            parse(table, body)
        assert (caught.value.message, caught.value.field) == (message, field)


def place(texts: list[str], pieces: list[tuple[int, str]]) -> Placed:
    """The offsets of tokens when the text comes in pieces: (tokens so far, new text)."""
    tokens = [TextLogprob(number, text, -1.0) for number, text in enumerate(texts)]
    offsets, placed, done = TextOffsets(), [], 0
    for count, text in pieces:
        placed += offsets.push(tuple(tokens[done:count]), text)
        done = count
    return placed + offsets.flush()


@pytest.mark.parametrize(
    ("texts", "text", "expected"),
    [
        ([" Paris", " is", "</s>"], "Paris is", [0, 5, 8]),
        ([" ", "x", "</s>"], "x", [0, 0, 1]),
        ([" the", " END", "</s>"], "the", [0, 3, 3]),  # a stop string, cut
        (["<pad>", " a", "<pad>", " b"], "a b", [0, 0, 1, 1]),  # special tokens, not shown
        (["bytes:\\xc3", "bytes:\\xa9", "t", "</s>"], "ét", [0, 0, 1, 2]),
        (["a", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", " b"], "a😀 b", [0, 1, 1, 2]),
        (["a", "a", "a"], "aaa", [0, 1, 2]),
        (["</s>"], "", [0]),
    ],
)
def test_offsets(texts: list[str], text: str, expected: list[int]) -> None:
    assert [offset for _, offset in place(texts, [(len(texts), text)])] == expected


@settings(deadline=None)
@given(st.lists(st.sampled_from([" a", "b", " b", "ab", " ", "</s>", "<pad>"]), min_size=1), st.data())
def test_offsets_do_not_depend_on_how_the_text_comes(texts: list[str], data: st.DataObject) -> None:
    shown = ["" if text.startswith("<") else text for text in texts]
    first = next((index for index, text in enumerate(shown) if text), None)
    if first is not None:
        shown[first] = shown[first].lstrip(" ")
    whole = "".join(shown)
    at_once = place(texts, [(len(texts), whole)])
    assert [token.token_id for token, _ in at_once] == list(range(len(texts)))
    pieces, given_out, sure = [], 0, 0
    for count, text in enumerate(shown, start=1):
        sure += len(text)
        end = data.draw(st.integers(given_out, sure))  # some of it may be held back
        pieces.append((count, whole[given_out:end]))
        given_out = end
    pieces.append((len(texts), whole[given_out:]))
    assert place(texts, pieces) == at_once
