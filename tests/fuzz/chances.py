"""Chances that do not cost: one in so many, usually this and rarely that."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy


def one_in(count: int) -> SearchStrategy[bool]:
    """True once in `count` times, about; the plain case is the False one, so counterexamples shrink to it."""
    return st.integers(0, count - 1).map(lambda drawn: drawn == count - 1)


def rarely(usual: SearchStrategy[Any], rare: SearchStrategy[Any], count: int = 8) -> SearchStrategy[Any]:
    """What is usual, and once in `count` times what is rare."""
    return one_in(count).flatmap(lambda is_rare: rare if is_rare else usual)
