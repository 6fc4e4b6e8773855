"""The word lists and patterns that generators draw from; data files under finetune/data/words, read once."""

from __future__ import annotations

import random
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

WORDS_DIR = Path(__file__).parent.parent / "data" / "words"


@cache
def word_list(name: str) -> tuple[str, ...]:
    """The words of `<name>.txt`, one a line; lines that begin with # are notes."""
    lines = (WORDS_DIR / f"{name}.txt").read_text(encoding="utf-8").split("\n")
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


@cache
def table(name: str) -> dict[str, Any]:
    """The contents of `<name>.toml`."""
    return tomllib.loads((WORDS_DIR / f"{name}.toml").read_text(encoding="utf-8"))


def pick(rng: random.Random, name: str) -> str:
    """One word of a list."""
    return rng.choice(word_list(name))


def pick_many(rng: random.Random, name: str, count: int) -> list[str]:
    """`count` different words of a list."""
    return rng.sample(word_list(name), count)


def join_words(words: list[str]) -> str:
    """
    >>> join_words(["apple", "pear", "plum"])
    'apple, pear and plum'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def with_article(word: str) -> str:
    """
    >>> with_article("apple"), with_article("car")
    ('an apple', 'a car')
    """
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def mend_articles(text: str) -> str:
    """
    >>> mend_articles("What a awful movie! A old book.")
    'What an awful movie! An old book.'
    """
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
