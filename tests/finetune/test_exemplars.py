"""Exemplars: the query is never one, k is kept or a smaller number, the wording is the query's."""

from __future__ import annotations

import random
from typing import Any

import pytest

from finetune.exemplars import draw_exemplars, fit, normalised, to_exemplar, with_own_options
from finetune.templates import TemplateError, parse_template
from serve.prompts import render
from serve.request import Exemplar, Mode


def pool(*keys: str) -> list[dict[str, Any]]:
    return [{"input": key, "key": key, "output": key.upper()} for key in keys]


def test_the_query_is_left_out_by_normalised_text() -> None:
    rows = pool("a  Coin", "b")
    for seed in range(20):
        drawn = draw_exemplars(lambda rng: rng.choice(rows), {"key": "A coin "}, 2, random.Random(seed))
        assert [row["key"] for row in drawn] == ["b"]


def test_k_different_exemplars_and_the_same_for_the_same_seed() -> None:
    rows = pool(*"abcdefgh")
    first, again, other = (
        [row["key"] for row in draw_exemplars(lambda rng: rng.choice(rows), {"key": "a"}, 3, random.Random(seed))]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) == 3


def test_a_pool_of_the_query_alone_gives_none() -> None:
    assert draw_exemplars(lambda rng: pool("a")[0], {"key": "a"}, 3, random.Random(0)) == []


def test_a_template_without_input_words_the_exemplars_like_the_query() -> None:
    template = parse_template("What is {input}?", "s[0]")
    assert to_exemplar({"input": "2", "output": "two"}, template, "What is 3?", "t") == Exemplar("What is 2?", "two")


def test_an_instruction_that_differs_from_row_to_row_cannot_stand_above_exemplars() -> None:
    template = parse_template({"instruction": "Is {word} in it?", "input": "{input}"}, "s[0]")
    with pytest.raises(TemplateError, match=r"template s\[0\] of task t: its instruction differs"):
        to_exemplar({"input": "x", "word": "a", "output": "no"}, template, "Is b in it?", "t")


def test_own_options_stand_in_the_exemplars_question() -> None:
    exemplar = with_own_options(Exemplar("Which?", "a", "why"), ("a", "b"))
    prompt = render(Mode.FEW_SHOT, "Choose.", "Which one?", ("c", "d"), [exemplar])
    assert prompt == ("Choose.\n\nQ: Which?\nOPTIONS:\n- a\n- b\nA: a\n\nQ: Which one?\nOPTIONS:\n- c\n- d\nA:")
    assert with_own_options(exemplar, ()) is exemplar


def test_fit_drops_from_the_front() -> None:
    cases = [Exemplar(str(number), "x") for number in range(4)]
    assert fit(cases, len, 2) == cases[2:]
    assert fit(cases, lambda some: 99, 2) == []


def test_normalised() -> None:
    assert normalised(" Straße\n\t A ") == normalised("STRASSE a")
