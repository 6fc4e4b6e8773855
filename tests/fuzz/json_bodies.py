"""JSON bodies from a document's schemas: valid, nearly valid, and no JSON at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.fuzz.chances import one_in, rarely
from tests.fuzz.odd_json import ENCODINGS, ODD_BODIES, ODD_NAMES, ODD_VALUES, Pairs, Token

Json = dict[str, Any]
Path = tuple[str | int, ...]


WORDS = st.sampled_from(
    ["the cat", "Is it?", "hello world", "2 and two", "The answer is 4.", "</s> <pad>", "é", "Q: a"]
)
TEXTS = rarely(WORDS, st.text(max_size=12))
SMALL = st.integers(1, 3)

EXEMPLAR_SET = "cases"  # the name of one that the servers have

# What a valid value is where a schema cannot say it, by the field's name.
HINTS: Mapping[str, SearchStrategy[Any]] = {
    "model": rarely(st.sampled_from(["default", "tgi", "dummy"]), TEXTS),
    "request_id": rarely(st.sampled_from(["mine", "a.b:c-d_1", "x" * 128]), TEXTS),
    "n": rarely(SMALL, st.integers(1, 64)),
    "samples": rarely(SMALL, st.integers(1, 64)),
    "best_of": rarely(SMALL, st.integers(1, 64)),
    "logit_bias": st.dictionaries(
        rarely(st.integers(3, 60), st.integers(0, 2**40)).map(str), st.floats(-100, 100), max_size=3
    ),
    "presence_penalty": st.sampled_from([0, 0.0, -0.0]),
    "frequency_penalty": st.sampled_from([0, 0.0, -0.0]),
    "typical_p": st.just(1.0),
    "watermark": st.just(False),
    "suffix": st.just(""),
    "exemplar_set": rarely(st.just(EXEMPLAR_SET), TEXTS),
}


def values(schema: Json, document: Json, name: str = "") -> SearchStrategy[Any]:
    """Values that the schema allows, short ones.

    Args:
        document: where its references lead.
        name: of the field, "" where there is none.
    """
    if name in HINTS:
        return HINTS[name]
    if "$ref" in schema:
        return values(resolve(schema, document), document)
    if "anyOf" in schema:
        return st.one_of([values(item, document) for item in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    make: Mapping[str, Callable[[], SearchStrategy[Any]]] = {
        "string": lambda: TEXTS,
        "boolean": st.booleans,
        "integer": lambda: _integers(schema),
        "number": lambda: _numbers(schema),
        "array": lambda: _arrays(schema, document),
        "object": lambda: _objects(schema, document),
    }
    return make[schema["type"]]()


def resolve(schema: Json, document: Json) -> Json:
    """The schema that a reference means; a schema that is none, itself."""
    found = document
    if "$ref" not in schema:
        return schema
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found


def _integers(schema: Json) -> SearchStrategy[int]:
    low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63 - 1)
    near = max(low, 0)
    return rarely(st.integers(near, min(near + 12, high)), st.integers(low, high))


def _numbers(schema: Json) -> SearchStrategy[float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    usual = st.sampled_from([0.5, 0.7, 0.9, 1, 1.0])
    rare = st.floats(
        low,
        schema.get("maximum"),
        exclude_min="exclusiveMinimum" in schema,
        allow_nan=False,
        allow_infinity=False,
    )
    return rarely(usual, rare)


def _arrays(schema: Json, document: Json) -> SearchStrategy[list[Any]]:
    low, high = schema.get("minItems", 0), schema.get("maxItems", 40)
    items = values(schema["items"], document)
    return rarely(
        st.lists(items, min_size=max(low, 1), max_size=min(3, high)), st.lists(items, min_size=low, max_size=high)
    )


def _objects(schema: Json, document: Json) -> SearchStrategy[Json]:
    fields = {name: values(field, document, name) for name, field in schema["properties"].items()}
    required = sorted(schema.get("required", ()))
    optional = sorted(set(fields) - set(required))

    @st.composite
    def objects(draw: DrawFn) -> Json:
        some = draw(st.lists(st.sampled_from(optional), unique=True, max_size=4)) if optional else []
        value = {name: draw(fields[name]) for name in (*required, *some)}
        return value if draw(one_in(8)) else _coherent(value)

    return objects()


def _coherent(value: Json) -> Json:
    """The object with fields that go together, which no schema says; most requests shall reach the model."""
    value = dict(value)
    if "samples" in value:
        value["mode"] = "cot"
        value.pop("n", None)
    if "num_exemplars" in value:
        value["exemplar_set"] = EXEMPLAR_SET
    if "exemplar_set" in value:
        value.pop("exemplars", None)
    if {"exemplar_set", "exemplars"} & value.keys() and value.get("mode") != "cot":
        value["mode"] = "few_shot"
    if value.get("mode") == "raw":
        for name in ("input", "options"):
            value.pop(name, None)
    if "stream_options" in value:
        value["stream"] = True
    if value.get("top_logprobs", 0) > 0:
        value["logprobs"] = True
    if "min_tokens" in value:
        value["min_tokens"] = min(value["min_tokens"], value.get("max_tokens", 8))
    return value


@st.composite
def bodies(draw: DrawFn, valid: SearchStrategy[Any], names: Sequence[str]) -> bytes:
    """What a client may send: mostly a valid object, often with one or two things wrong, sometimes no JSON.

    Args:
        names: of the schema's fields.
    """
    if draw(one_in(25)):
        return draw(st.sampled_from(ODD_BODIES) | st.binary(max_size=40))
    value = draw(valid)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2]))):
        value = draw(_spoiled(value, names))
    text = _write(value, ascii_only=draw(st.booleans()))
    if draw(one_in(30)):
        return text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    raw = text.encode("utf-8", "surrogatepass")
    return draw(mutated(raw)) if draw(one_in(12)) else raw


@st.composite
def _spoiled(draw: DrawFn, value: Any, names: Sequence[str]) -> Any:
    """The value with one thing wrong somewhere in it, or one thing odd."""
    path: Path = draw(st.sampled_from(_paths(value)))
    kind = draw(st.sampled_from(["change", "change", "change", "remove", "add", "add known", "twice"]))
    target = _at(value, path)
    odd = draw(st.sampled_from(ODD_VALUES))
    if kind == "change" or not isinstance(target, dict):
        return _replaced(value, path, odd)
    if kind == "remove" and target:
        gone = draw(st.sampled_from(sorted(target)))
        return _replaced(value, path, {name: item for name, item in target.items() if name != gone})
    if kind == "twice" and target:
        again = draw(st.sampled_from(sorted(target)))
        return _replaced(value, path, Pairs((*target.items(), (again, target[again]))))
    name = draw(st.sampled_from(names) if kind == "add known" else st.sampled_from(ODD_NAMES) | st.text(max_size=8))
    return _replaced(value, path, {**target, name: odd})


@st.composite
def mutated(draw: DrawFn, raw: bytes) -> bytes:
    """The bytes with one to three of them changed, cut, doubled or added."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["change", "insert", "delete", "cut", "double"]))
        byte = draw(st.integers(0, 255))
        if kind == "change" and changed:
            changed[at] = byte
        elif kind == "delete":
            del changed[at : at + 1 + byte % 4]
        elif kind == "cut":
            del changed[at:]
        elif kind == "double":
            changed[at:at] = changed[at : at + 1 + byte % 16]
        else:
            changed[at:at] = bytes([byte])
    return bytes(changed)


def _paths(value: Any) -> list[Path]:
    """The ways to every part of a value, itself included; of long lists the first parts."""
    found: list[Path] = [()]
    parts: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = list(enumerate(value[:3]))
    for key, part in parts:
        found += [(key, *path) for path in _paths(part)]
    return found


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, list):
        return [_replaced(item, rest, new) if index == key else item for index, item in enumerate(value)]
    return {name: _replaced(item, rest, new) if name == key else item for name, item in value.items()}


def _write(value: Any, *, ascii_only: bool) -> str:
    """The value as JSON, tokens as they stand."""
    if isinstance(value, Token):
        return value.text
    if isinstance(value, dict):
        value = Pairs(tuple(value.items()))
    if isinstance(value, Pairs):
        members = (
            f"{json.dumps(name, ensure_ascii=ascii_only)}: {_write(item, ascii_only=ascii_only)}"
            for name, item in value.items
        )
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_write(item, ascii_only=ascii_only) for item in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)
