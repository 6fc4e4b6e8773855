"""What must never be trained on, as data: finetune/data/contamination.toml."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from finetune.tasks import Task

RULES_PATH = Path(__file__).parent / "data" / "contamination.toml"
_NI_NUMBER = re.compile(r"\btask0*(\d+)(?=_|\b)")


def reason_to_refuse(task: Task) -> str | None:
    """Why a task may not be in a training mixture, or None. The rules look at its source, not only at its name."""
    if task.evaluation_only:
        return "it is marked evaluation_only"
    if task.path is None:
        return None
    rules = _rules()
    for pattern in rules["paths"]:
        if fnmatchcase(task.path, pattern):
            return f"{task.path} matches {pattern}"
    number = _NI_NUMBER.search(task.path)
    if number is None or task.reader != "natural_instructions":
        return None
    value = int(number.group(1))
    for low, high in rules["natural_instructions_mmlu"]:
        if low <= value <= high:
            return f"Natural Instructions {low}-{high} are MMLU questions"
    if value in rules["natural_instructions_test"]:
        return f"task {value} is in the official Natural Instructions test split"
    return None


@cache
def _rules() -> dict[str, Any]:
    rules = tomllib.loads(RULES_PATH.read_text(encoding="utf-8"))
    rules["natural_instructions_test"] = frozenset(rules["natural_instructions_test"])
    return rules
