"""Rows that we make ourselves: narrow tasks with an unlimited number of cases, for small models and for tests.

A generator is a function `make(rng, settings) -> row`, pure in the state of `rng`. A row has `input`, `output`,
perhaps `options` and `rationale`, and `key`: what the case is about, whatever the wording. The key's hash decides on
which side of the split a case falls, so train and held-out are disjoint by construction, in every run and seed.

>>> row = generate("parity", 3, stream="1", held_out=False)
>>> row["output"] in ("odd", "even")
True
>>> row == generate("parity", 3, stream="1", held_out=False)
True
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

from finetune.generators import logic, numbers, questions, stories, word_lists, words

Row = dict[str, Any]
Generator = Callable[[random.Random, Mapping[str, Any]], Row]

HELD_OUT_PERCENT = 10
_MAX_TRIES = 2000  # a generator whose cases nearly all fall on one side of the split is a mistake, not bad luck

GENERATORS: dict[str, Generator] = {
    "alphabetical_order": words.alphabetical_order,
    "arithmetic": numbers.arithmetic,
    "boolean_expression": logic.boolean_expression,
    "coin_flip": logic.coin_flip,
    "compare_numbers": numbers.compare_numbers,
    "last_letters": words.last_letters,
    "list_membership": word_lists.membership,
    "list_operation": word_lists.list_operation,
    "number_list": numbers.number_list,
    "odd_one_out": word_lists.odd_one_out,
    "parity": numbers.parity,
    "question_type": questions.question_type,
    "review_sentiment": questions.review_sentiment,
    "story_question": stories.story_question,
    "word_category": word_lists.word_category,
    "word_problem": stories.word_problem,
}


def generate(name: str, index: int, *, stream: str, held_out: bool, settings: Mapping[str, Any] | None = None) -> Row:
    """Row number `index` of a generator's train or held-out side; the same arguments give the same row.

    `stream` names the random stream (seed and task), so that two tasks of one generator do not get the same rows.
    """
    make = GENERATORS[name]
    rng = random.Random(f"{stream}/{name}/{held_out}/{index}")
    chosen: Mapping[str, Any] = {} if settings is None else settings
    for _ in range(_MAX_TRIES):
        row = make(rng, chosen)
        if is_held_out(str(row["key"]), HELD_OUT_PERCENT / 100) == held_out:
            return row
    raise ValueError(f"generator {name} with {dict(chosen)} has no case on the {held_out=} side of its split")


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a case belongs to the held-out part: the hash of its normalised key, so it never depends on order.

    >>> is_held_out("17 + 25", 0.1) == is_held_out("  17 +  25", 0.1)
    True
    """
    digest = hashlib.blake2b(" ".join(key.casefold().split()).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < fraction * 2**32
