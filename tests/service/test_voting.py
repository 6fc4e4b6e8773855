from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.voting import Ballot, normalise, vote


def ballots(*answers: str | None, logprobs: tuple[float, ...] | None = None) -> list[Ballot]:
    values = tuple(-1.0 for _ in answers) if logprobs is None else logprobs
    return [Ballot(index, answer, values[index]) for index, answer in enumerate(answers)]


@pytest.mark.parametrize(
    "same",
    [
        ("5", "5.0", "$5", "5.", " 5 ", "05", "+5", "5.00", "£5", "５", "(5)", "٥", "$ 5"),
        ("5000", "5,000", "$5,000.00", "5000.0"),
        ("-3", "−3", "-3.0", "-$3"),
        ("0", "-0", "0.00", "+0"),
        ("0.5", ".5", "0.50"),
        ("yes", "Yes", " YES. ", '"yes"', "(yes)"),
        ("new  york", "New York"),
        ("123456789012345678901234567890", "123,456,789,012,345,678,901,234,567,890.0"),
    ],
)
def test_what_counts_as_the_same_answer(same: tuple[str, ...]) -> None:
    assert len({normalise(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("5", "50"),
        ("5", "-5"),
        ("5", "5%"),
        ("5", "0.5"),
        ("5,00", "500"),
        ("yes", "no"),
        ("a b", "ab"),
        ("123456789012345678901234567890", "123456789012345678901234567891"),
        ("1/2", "12"),
        ("...", "!"),
    ],
)
def test_what_does_not(left: str, right: str) -> None:
    assert normalise(left) != normalise(right)


def test_numbers_vote_together() -> None:
    result = vote(ballots("7", "5", "5.0", "$5", "7"))
    assert (result.answer, result.tie) == ("5", False)
    assert [(entry.answer, entry.count) for entry in result.votes] == [("5", 3), ("7", 2)]


def test_a_tie_goes_to_the_higher_summed_logprob_and_is_told() -> None:
    result = vote(ballots("5", "5", "7", "7", logprobs=(-3.0, -3.0, -1.0, -4.0)))
    assert (result.answer, result.tie) == ("7", True)


def test_an_even_tie_goes_to_the_lower_index() -> None:
    result = vote(ballots("5", "7", "7", "5"))
    assert (result.answer, result.tie) == ("5", True)
    assert vote(ballots("7", "5", "5", "7")).answer == "7"


def test_null_never_beats_an_answer() -> None:
    result = vote(ballots(None, None, None, "4", logprobs=(-1.0, -1.0, -1.0, -50.0)))
    assert (result.answer, result.tie) == ("4", False)
    assert [(entry.answer, entry.count) for entry in result.votes] == [("4", 1), (None, 3)]
    assert vote(ballots(None, "4")).tie is False


def test_all_null_is_null() -> None:
    result = vote(ballots(None, None))
    assert (result.answer, result.tie) == (None, False)
    assert [(entry.answer, entry.count, entry.weight) for entry in result.votes] == [(None, 2, 1.0)]


def test_nobody_voted() -> None:
    result = vote([])
    assert (result.answer, result.votes, result.tie) == (None, (), False)


def test_weights_are_shares_of_probability() -> None:
    result = vote(ballots("a", "b", "a", logprobs=(math.log(0.2), math.log(0.1), math.log(0.1))))
    assert [round(entry.weight, 6) for entry in result.votes] == [0.75, 0.25]
    far_away = vote(ballots("a", "b", logprobs=(-5000.0, -9999.0)))
    assert [entry.weight for entry in far_away.votes] == [1.0, 0.0]


def test_the_most_frequent_spelling_is_shown() -> None:
    assert vote(ballots("$5", "5.0", "$5")).answer == "$5"
    assert vote(ballots("5.0", "$5", "5")).answer == "5"


ANSWERS = st.sampled_from([None, "5", "5.0", "$5", "7", "7.", "yes", "Yes", "no"])


@given(
    cast=st.lists(st.tuples(ANSWERS, st.floats(-100, 0)), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_the_order_of_samples_changes_nothing(cast: list[tuple[str | None, float]], order: object) -> None:
    original = [Ballot(index, answer, logprob) for index, (answer, logprob) in enumerate(cast)]
    shuffled = list(original)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert vote(shuffled) == vote(original)
    # Also when their indices change with them, but for a tie that only the index can decide.
    renumbered = vote([Ballot(index, ballot.answer, ballot.logprob) for index, ballot in enumerate(shuffled)])
    first = vote(original)
    sums: dict[str | None, list[float]] = {}
    for answer, logprob in cast:
        sums.setdefault(None if answer is None else normalise(answer), []).append(logprob)
    if len({(len(group), math.fsum(group)) for group in sums.values()}) == len(sums):
        assert renumbered == first
    assert math.isclose(math.fsum(entry.weight for entry in first.votes), 1.0)
    assert sum(entry.count for entry in first.votes) == len(cast)
    assert (first.answer is None) == all(answer is None for answer, _ in cast)
