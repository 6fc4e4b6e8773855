"""The fenced blocks of Markdown pages: what is to be run, and what it is shown to print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
_FENCE = re.compile(r"^```(?P<language>\w*)(?P<is_output> output)?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
# What is another at each run. Every other value must be the one on the page.
_VOLATILE = re.compile(r"request_id|requestId|id|created|\w*(_ms|Ms)")
_TOLERANCE = 0.02  # of probabilities and their logarithms: the weights' form follows the processor


@dataclass(frozen=True)
class Block:
    """`place`: page and line of it, for messages. `output`: what the page shows that it prints, if it does."""

    place: str
    language: str
    body: str
    output: str | None = None


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found: list[Block] = []
    for fence in _FENCE.finditer(text):
        if fence["is_output"]:
            last = found[-1]
            found[-1] = Block(last.place, last.language, last.body, fence["body"])
        else:
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(f"{path.relative_to(ROOT)}:{line}", fence["language"], fence["body"]))
    return found


def check_output(shown: str, printed: str) -> None:
    """
    Raises:
        AssertionError: what was printed is not what is shown.
    """
    try:
        expected, actual = json.loads(shown), json.loads(printed)
    except ValueError:
        expected, actual = list(_events(shown)), list(_events(printed))
    _check(expected, actual, "")


def _events(text: str) -> Iterator[Any]:
    """The lines; of an event stream its events, with the pieces of text joined: how they are cut is chance."""
    pieces: dict[str, Any] | None = None
    for line in text.strip().splitlines():
        data = re.fullmatch(r"data: ?(\{.*\})", line)
        event = json.loads(data[1]) if data else line
        if isinstance(event, dict) and "text" in event and "index" in event:
            pieces = event if pieces is None else {**event, "text": pieces["text"] + event["text"]}
        elif line:
            if pieces is not None:
                yield pieces
                pieces = None
            yield event
    if pieces is not None:
        yield pieces


def _check(expected: Any, actual: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert isinstance(actual, dict), where
        assert list(expected) == list(actual), f"{where}: {list(actual)}"
        for name, value in expected.items():
            if _VOLATILE.fullmatch(name):
                assert type(actual[name]) in ({int, float} if isinstance(value, float) else {type(value)}), name
            else:
                _check(value, actual[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert isinstance(actual, list), where
        assert len(expected) == len(actual), f"{where}: {actual}"
        for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
            _check(one, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert abs(expected - actual) <= _TOLERANCE * max(1.0, abs(expected)), f"{where}: {actual}"
    else:
        assert expected == actual, f"{where}: {actual!r}"
