"""Exemplar sets that requests name instead of carrying: one file a set, read once at the start.

    sentiment.jsonl   {"input": "A warm film.", "output": "positive"}      one exemplar a line
    gsm.json          [{"input": "…", "output": "4", "rationale": "…"}]    or one JSON list

The set's name is the file's name without its ending.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.request import Exemplar

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
