"""Which exemplars a prompt may show: the request's own, or those of a set that it names.

Sets are read once at the start, one file a set:

    sentiment.jsonl   {"input": "A warm film.", "output": "positive"}      one exemplar a line
    gsm.json          [{"input": "…", "output": "4", "rationale": "…"}]    or one JSON list

The set's name is the file's name without its ending.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.errors import InvalidRequest
from serve.request import Exemplar, GenerateRequest, Mode, ScoreRequest

MAX_EXEMPLARS = 256  # of one request; a set may have more
_MAX_LENGTH_RATIO = 4
_EXEMPLAR_MODES = (Mode.FEW_SHOT, Mode.COT)
_FIELDS = {"input", "output", "rationale"}
_ENDINGS = (".json", ".jsonl")


class ExemplarError(Exception):
    """Exemplar files that cannot be read; the message has one line an error, each with its file."""


def load_sets(folder: Path) -> dict[str, tuple[Exemplar, ...]]:
    """
    Raises:
        ExemplarError: with every damaged file and line.
    """
    sets: dict[str, tuple[Exemplar, ...]] = {}
    errors: list[str] = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in _ENDINGS):
        if path.stem in sets:
            errors.append(f"{path}: a set named {path.stem!r} was already read from another file")
            continue
        try:
            sets[path.stem] = tuple(_to_exemplar(row, where) for where, row in _rows(path))
        except (OSError, ValueError) as error:
            errors.append(f"{path}: {error}")
    if not sets and not errors:
        errors.append(f"{folder}: holds no .json or .jsonl file")
    if errors:
        raise ExemplarError("\n".join(errors))
    return sets


def select(request: GenerateRequest | ScoreRequest, sets: Mapping[str, tuple[Exemplar, ...]]) -> tuple[Exemplar, ...]:
    """The exemplars that a request asks for, in order, without the query itself.

    Raises:
        InvalidRequest: naming the field.
    """
    said = [name for name in ("exemplars", "exemplar_set", "num_exemplars") if _is_said(getattr(request, name))]
    if said and request.mode not in _EXEMPLAR_MODES:
        raise InvalidRequest(f"{said[0]} is for the modes few_shot and cot, not {request.mode.value}", field=said[0])
    if request.exemplars and request.exemplar_set is not None:
        raise InvalidRequest("exemplars and exemplar_set exclude each other", field="exemplar_set")
    if request.num_exemplars is not None:
        if request.exemplar_set is None:
            raise InvalidRequest("num_exemplars says how many of exemplar_set to take; name one", field="num_exemplars")
        if request.num_exemplars < 0:
            raise InvalidRequest(
                f"num_exemplars must be at least 0, not {request.num_exemplars}", field="num_exemplars"
            )
    exemplars = request.exemplars
    if request.exemplar_set is not None:
        exemplars = _named_set(request.exemplar_set, sets)
    for exemplar in exemplars:
        if not exemplar.input.strip() or not exemplar.output.strip():
            raise InvalidRequest("an exemplar's input and output must not be blank", field="exemplars")
    if not exemplars:
        return ()
    query = _query(request)
    normalised = _normalised(query)
    # One many times as long is another text; normalising megabytes holds the interpreter's lock for a second.
    longest = _MAX_LENGTH_RATIO * len(query) + 1000
    others = tuple(
        exemplar for exemplar in exemplars if len(exemplar.input) > longest or _normalised(exemplar.input) != normalised
    )
    return others if request.num_exemplars is None else others[: request.num_exemplars]


def _named_set(name: str, sets: Mapping[str, tuple[Exemplar, ...]]) -> tuple[Exemplar, ...]:
    if name not in sets:
        near = difflib.get_close_matches(name, sets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidRequest(f"no exemplar set has the name {name[:100]!r}{hint}", field="exemplar_set")
    return sets[name]


def _query(request: GenerateRequest | ScoreRequest) -> str:
    if request.input is not None and request.input.strip():
        return request.input
    return "" if request.instruction is None else request.instruction


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _is_said(value: object) -> bool:
    return value is not None and value != ()


def _rows(path: Path) -> list[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(f"line {number}", _loads(line, f"line {number}")) for number, line in lines]
    content = _loads(text, "file")
    if not isinstance(content, list):
        raise ValueError("must hold a JSON list of exemplars")
    return [(f"item {number}", row) for number, row in enumerate(content, 1)]


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _to_exemplar(row: Any, where: str) -> Exemplar:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: must be an object with input and output")
    unknown = set(row) - _FIELDS
    if unknown:
        raise ValueError(f"{where}: unknown field {sorted(unknown)[0]!r}; fields are input, output, rationale")
    for name in ("input", "output"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where}: {name} must be a non-empty string")
    rationale = row.get("rationale")
    if rationale is not None and not isinstance(rationale, str):
        raise ValueError(f"{where}: rationale must be a string")
    return Exemplar(row["input"], row["output"], rationale)
