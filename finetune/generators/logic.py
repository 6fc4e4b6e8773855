"""State tracking and boolean expressions, with the chain that leads to the answer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from finetune.generators.material import pick_many

Row = dict[str, Any]
_YES_NO = ["yes", "no"]


def coin_flip(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """A coin, heads up; two or more people flip it or do not. settings: min_people, max_people."""
    count = rng.randint(int(settings.get("min_people", 2)), int(settings.get("max_people", 4)))
    side, sentences, steps = "heads", [], []
    for name in pick_many(rng, "first_names", count):
        flips = rng.random() < 0.5
        side = {"heads": "tails", "tails": "heads"}[side] if flips else side
        sentences.append(f"{name} flips the coin." if flips else f"{name} does not flip the coin.")
        steps.append(f"{name} flips it: {side}." if flips else f"{name} does not flip it: {side}.")
    question = f"A coin is heads up. {' '.join(sentences)} Is the coin still heads up?"
    return {
        "input": question,
        "output": "yes" if side == "heads" else "no",
        "options": _YES_NO,
        "rationale": f"The coin starts heads. {' '.join(steps)}",
        "key": question,
    }


def boolean_expression(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """`not true and false`-like expressions of two or three operands. Parts are evaluated one after the other."""
    expression, value, steps = _operand(rng)
    joiner = rng.choice(["and", "or"])
    right, right_value, right_steps = _operand(rng)
    steps += right_steps
    text = f"{expression} {joiner} {right}"
    result = (value and right_value) if joiner == "and" else (value or right_value)
    steps.append(f"{_word(value)} {joiner} {_word(right_value)} is {_word(result)}.")
    if rng.random() < 0.5:
        last = rng.random() < 0.5
        outer = rng.choice(["and", "or"])
        text = f"({text}) {outer} {_word(last)}"
        total = (result and last) if outer == "and" else (result or last)
        steps.append(f"{_word(result)} {outer} {_word(last)} is {_word(total)}.")
        result = total
    return {
        "input": text,
        "output": _word(result),
        "options": ["true", "false"],
        "rationale": " ".join(steps),
        "key": text,
    }


def _operand(rng: random.Random) -> tuple[str, bool, list[str]]:
    value = rng.random() < 0.5
    if rng.random() < 0.4:
        return f"not {_word(value)}", not value, [f"not {_word(value)} is {_word(not value)}."]
    return _word(value), value, []


def _word(value: bool) -> str:
    return "true" if value else "false"
