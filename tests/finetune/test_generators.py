"""Generators: answers are right by an independent check, the split is disjoint, the chains lead to the answer."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune.generators import GENERATORS, generate, is_held_out
from finetune.generators.material import WORDS_DIR, mend_articles, table, word_list

NUM = 150


def rows(name: str, held_out: bool = False, **settings: Any) -> list[dict[str, Any]]:
    return [generate(name, index, stream="test", held_out=held_out, settings=settings) for index in range(NUM)]


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_rows_are_whole_seeded_and_on_their_side(name: str) -> None:
    train, held_out = rows(name), rows(name, held_out=True)
    assert train == rows(name)
    assert not {row["key"] for row in train} & {row["key"] for row in held_out}
    assert all(is_held_out(row["key"], 0.1) for row in held_out)
    for row in train + held_out:
        assert row["input"].strip() == row["input"] != ""
        assert row["output"].strip() == row["output"] != ""
        assert not re.search(r"[{}<>~^\\`]", row["input"] + row["output"] + row.get("rationale", ""))
        assert "options" not in row or row["output"] in row["options"]


def test_another_stream_gives_other_rows() -> None:
    first = [generate("coin_flip", index, stream="a", held_out=False) for index in range(20)]
    assert first != [generate("coin_flip", index, stream="b", held_out=False) for index in range(20)]


def test_coin_flip_counts_flips() -> None:
    for row in rows("coin_flip"):
        flips = row["input"].count(" flips the coin")
        assert row["output"] == ("yes" if flips % 2 == 0 else "no")
        assert row["rationale"].endswith("heads." if row["output"] == "yes" else "tails.")


@pytest.mark.parametrize("operation", ["+", "-"])
def test_arithmetic_and_its_chain(operation: str) -> None:
    for row in rows("arithmetic", operation=operation):
        left, sign, right = row["input"].split()
        expected = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert sign == operation
        assert row["output"] == str(expected)
        assert 0 <= expected <= 99
        for step in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", row["rationale"]):
            assert eval("".join(step[:3])) == int(step[3])
        assert row["rationale"].endswith(f"= {expected}.")


def test_word_problem_chain_ends_in_the_answer() -> None:
    for row in rows("word_problem"):
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", row["rationale"])
        assert len(steps) == 2
        assert all(eval("".join(step[:3])) == int(step[3]) for step in steps)
        assert steps[0][3] == steps[1][0]
        assert steps[1][3] == row["output"]
        assert int(row["output"]) >= 0
        assert all(number in row["input"] for number in (steps[0][0], steps[0][2], steps[1][2]))


def test_boolean_expressions_agree_with_python() -> None:
    for row in rows("boolean_expression"):
        assert str(eval(row["input"].replace("true", "True").replace("false", "False"))).lower() == row["output"]
        assert row["rationale"].endswith(f"is {row['output']}.")


def test_last_letters() -> None:
    for row in rows("last_letters"):
        assert row["output"] == "".join(word[-1] for word in row["input"].split()).lower()


@pytest.mark.parametrize(
    ("operation", "answer"),
    [
        ("first", lambda items: items[0]),
        ("second", lambda items: items[1]),
        ("third", lambda items: items[2]),
        ("last", lambda items: items[-1]),
        ("count", lambda items: str(len(items))),
        ("reverse", lambda items: ", ".join(items[::-1])),
        ("copy", ", ".join),
        ("sort", lambda items: ", ".join(sorted(items))),
    ],
)
def test_list_operations(operation: str, answer: Any) -> None:
    for row in rows("list_operation", operation=operation):
        assert row["output"] == answer(row["input"].split(", "))


def test_numbers() -> None:
    for operation, choose in (("largest", max), ("smallest", min)):
        for row in rows("number_list", operation=operation):
            assert row["output"] == str(choose(int(number) for number in row["input"].split(", ")))
    for row in rows("number_list", operation="sort"):
        assert row["output"].split(", ") == sorted(row["input"].split(", "), key=int)
    for ask, choose in (("larger", max), ("smaller", min)):
        for row in rows("compare_numbers", ask=ask):
            assert row["output"] == str(choose(int(row["left"]), int(row["right"])))
    for row in rows("parity"):
        assert row["output"] == ("even" if row["input"][-1] in "02468" else "odd")


def test_words_in_lists() -> None:
    for row in rows("list_membership"):
        assert row["output"] == ("yes" if row["word"] in row["input"].split(", ") else "no")
    for row in rows("alphabetical_order"):
        assert row["output"] == min(row["left"], row["right"])


def test_odd_one_out_is_in_no_category_of_the_others() -> None:
    categories = {name: set(entry["words"]) for name, entry in table("categories").items()}
    for row in rows("odd_one_out"):
        others = {item for item in row["input"].split(", ") if item != row["output"]}
        shared = [words for words in categories.values() if others <= words]
        assert shared
        assert not any(row["output"] in words for words in shared)


def test_stories_answer_with_a_word_of_the_story() -> None:
    for row in rows("story_question"):
        fact = row["rationale"].removeprefix("The story says: ")
        assert fact in row["story"]
        assert row["output"] in fact
        assert row["story"].count(row["output"]) >= 1


def test_both_sides_of_yes_and_no_are_common() -> None:
    for name in ("coin_flip", "list_membership", "parity", "boolean_expression", "review_sentiment"):
        counts = {answer: sum(row["output"] == answer for row in rows(name)) for answer in rows(name)[0]["options"]}
        assert min(counts.values()) > NUM * 0.25, (name, counts)


def test_a_generator_without_cases_on_a_side_says_so() -> None:
    with pytest.raises(ValueError, match="generator parity with"):
        generate("parity", 0, stream="x", held_out=not is_held_out("0", 0.1), settings={"max_number": 0})


def test_articles() -> None:
    assert mend_articles("What a awful film, a owl and a car.") == "What an awful film, an owl and a car."


def test_word_lists_have_no_repeats() -> None:
    names = sorted(path.stem for path in WORDS_DIR.glob("*.txt"))
    assert len(names) == 10
    for name in names:
        words = word_list(name)
        assert len(words) == len(set(words)) >= 16
