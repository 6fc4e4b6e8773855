"""Letters of words and their alphabetical order."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from finetune.generators.material import pick_many

Row = dict[str, Any]


def last_letters(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Concatenate the last letters of names or words. settings: num_words (2), source ("first_names")."""
    count = int(settings.get("num_words", 2))
    chosen = pick_many(rng, str(settings.get("source", "first_names")), count)
    answer = "".join(word[-1].lower() for word in chosen)
    steps = [f"The last letter of {word} is {word[-1].lower()}." for word in chosen]
    text = " ".join(chosen)
    return {"input": text, "output": answer, "rationale": " ".join(steps), "key": text}


def alphabetical_order(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Which of two words with different first letters comes first in the alphabet."""
    left, right = pick_many(rng, "common_words", 2)
    while left[0] == right[0]:
        left, right = pick_many(rng, "common_words", 2)
    first, second = sorted([left, right])
    return {
        "input": f"{left}, {right}",
        "output": first,
        "options": [left, right],
        "rationale": f"{first} begins with {first[0]} and {second} begins with {second[0]}. "
        f"{first[0]} comes before {second[0]}",
        "key": f"{first} {second}",
        "left": left,
        "right": right,
    }
