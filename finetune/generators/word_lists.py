"""Lists of words: which item stands where, how many there are, what belongs together."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from finetune.generators.material import join_words, pick, pick_many, table, with_article

Row = dict[str, Any]

_OPERATIONS: dict[str, Callable[[list[str]], str]] = {
    "first": lambda items: items[0],
    "second": lambda items: items[1],
    "third": lambda items: items[2],
    "last": lambda items: items[-1],
    "count": lambda items: str(len(items)),
    "reverse": lambda items: ", ".join(reversed(items)),
    "copy": ", ".join,
    "sort": lambda items: ", ".join(sorted(items)),
}


def list_operation(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """One operation on a list of everyday words. settings: operation, min_items (3), max_items (5)."""
    operation = str(settings.get("operation", "first"))
    count = rng.randint(int(settings.get("min_items", 3)), int(settings.get("max_items", 5)))
    items = pick_many(rng, "common_words", count)
    text = ", ".join(items)
    return {"input": text, "output": _OPERATIONS[operation](items), "key": text}


def membership(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Whether a word is in a list. settings: min_items (3), max_items (5)."""
    items = pick_many(rng, "common_words", rng.randint(int(settings.get("min_items", 3)), 5))
    is_there = rng.random() < 0.5
    word = rng.choice(items) if is_there else pick(rng, "common_words")
    is_there = word in items
    text = ", ".join(items)
    return {
        "input": text,
        "output": "yes" if is_there else "no",
        "options": ["yes", "no"],
        "key": f"{word}: {text}",
        "word": word,
    }


def odd_one_out(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Three or four words of one category and one of another; the items are the options."""
    categories = table("categories")
    own, other = rng.sample(sorted(categories), 2)
    odd = rng.choice([word for word in categories[other]["words"] if word not in categories[own]["words"]])
    alike = rng.sample(categories[own]["words"], rng.choice([3, 3, 4]))
    items = [*alike, odd]
    rng.shuffle(items)
    alike = [item for item in items if item != odd]
    text = ", ".join(items)
    return {
        "input": text,
        "output": odd,
        "options": items,
        "rationale": f"{join_words(alike)} are {categories[own]['plural']}, but {odd} is {with_article(other)}",
        "key": " ".join(sorted(items)),
    }


def word_category(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Which of three kinds of things a word is. Held out are combinations of word and choices, never words."""
    categories = table("categories")
    name = rng.choice(sorted(categories))
    word = rng.choice(categories[name]["words"])
    others = [other for other in sorted(categories) if other != name and word not in categories[other]["words"]]
    options = [name, *rng.sample(others, 2)]
    rng.shuffle(options)
    return {
        "input": word,
        "output": name,
        "options": options,
        "key": f"{word}: {' '.join(sorted(options))}",
    }
