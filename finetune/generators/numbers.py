"""Small whole numbers: sums and differences, comparisons, parity, lists of numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


def arithmetic(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """One sum or difference with a result of 0 to `max_result` (99). settings: operation = "+", "-" or "both".

    The chain takes the tens first and then the ones: 52 - 27 = 52 - 20 - 7.
    """
    limit = int(settings.get("max_result", 99))
    operation = str(settings.get("operation", "both"))
    sign = rng.choice("+-") if operation == "both" else operation
    total = rng.randint(0, limit)
    part = rng.randint(0, total)
    left, right, result = (part, total - part, total) if sign == "+" else (total, part, total - part)
    return {
        "input": f"{left} {sign} {right}",
        "output": str(result),
        "rationale": step_by_step(left, sign, right),
        "key": f"{left} {sign} {right}",
        "left": str(left),
        "right": str(right),
    }


def step_by_step(left: int, sign: str, right: int) -> str:
    """The tens first, then the ones; one step when one of them is 0.

    >>> step_by_step(52, "-", 27)
    '52 - 20 = 32. 32 - 7 = 25.'
    >>> step_by_step(5, "+", 3)
    '5 + 3 = 8.'
    """
    parts = [part for part in (right // 10 * 10, right % 10) if part] or [0]
    steps, value = [], left
    for part in parts:
        result = value + part if sign == "+" else value - part
        steps.append(f"{value} {sign} {part} = {result}.")
        value = result
    return " ".join(steps)


def compare_numbers(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Which of two numbers is larger or smaller. settings: ask = "larger" or "smaller", max_number (999)."""
    ask = str(settings.get("ask", "larger"))
    limit = rng.choice([99, int(settings.get("max_number", 999))])
    left, right = rng.sample(range(limit + 1), 2)
    answer = max(left, right) if ask == "larger" else min(left, right)
    other = left + right - answer
    return {
        "input": f"{left}, {right}",
        "output": str(answer),
        "rationale": f"{answer} is {ask} than {other}",
        "key": f"{min(left, right)} {max(left, right)}",
        "left": str(left),
        "right": str(right),
    }


def parity(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Odd or even. settings: max_number (499)."""
    number = rng.randint(0, int(settings.get("max_number", 499)))
    answer = "odd" if number % 2 else "even"
    return {
        "input": str(number),
        "output": answer,
        "options": ["odd", "even"],
        "rationale": f"The last digit of {number} is {number % 10}, and {number % 10} is {answer}",
        "key": str(number),
    }


def number_list(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """A list of 3 to 5 different numbers. settings: operation = "largest", "smallest" or "sort", max_number (99)."""
    operation = str(settings.get("operation", "largest"))
    count = rng.randint(3, 4 if operation == "sort" else 5)
    values = rng.sample(range(int(settings.get("max_number", 99)) + 1), count)
    if operation == "sort":
        output = ", ".join(str(value) for value in sorted(values))
    else:
        output = str(max(values) if operation == "largest" else min(values))
    text = ", ".join(str(value) for value in values)
    return {"input": text, "output": output, "key": " ".join(str(value) for value in sorted(values))}
