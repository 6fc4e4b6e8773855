"""Packing: the docstrings' worked examples, order, overflow, leftovers, over-long examples."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from finetune.example import TokenExample
from finetune.packing import Packer, PackingStats, fit_lengths, pack


def example(num_inputs: int, num_targets: int, task: str = "t") -> TokenExample:
    return TokenExample((*[5] * (num_inputs - 1), 1), (*[6] * (num_targets - 1), 1), task)


def test_the_worked_example() -> None:
    examples = [example(3, 2), example(4, 2), example(2, 1), example(8, 4)]
    rows = list(pack(examples, input_length=8, target_length=4))
    assert [[len(item.encoder_input_tokens) for item in row.examples] for row in rows] == [[3, 4], [2], [8]]


def test_either_side_may_overflow() -> None:
    rows = list(pack([example(2, 3), example(2, 2), example(2, 2)], input_length=8, target_length=4))
    assert [row.num_target_tokens for row in rows] == [3, 4]


def test_order_is_kept_and_nothing_is_lost() -> None:
    examples = [example(1 + n % 7, 1 + n % 3, str(n)) for n in range(1, 60)]
    packed = [item.task for row in pack(examples, 16, 8) for item in row.examples]
    assert packed == [item.task for item in examples]


def test_leftovers_survive_json() -> None:
    straight, resumed = Packer(16, 8), Packer(16, 8)
    examples = [example(1 + n % 7, 1 + n % 3, str(n)) for n in range(1, 40)]
    expected = [row for item in examples if (row := straight.add(item)) is not None]
    first = Packer(16, 8)
    rows = [row for item in examples[:17] if (row := first.add(item)) is not None]
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rows += [row for item in examples[17:] if (row := resumed.add(item)) is not None]
    assert rows == expected
    assert resumed.flush() == straight.flush()


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"9 inputs and 2 targets is longer than a row \(8 and 4\)"):
        Packer(8, 4).add(example(9, 2))


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ("trim", ((7, 8, 9, 1), (5, 5, 1), True)),
        ("no_eos", ((7, 8, 9, 1), (5, 5, 5), True)),
        ("drop", None),
    ],
)
def test_an_overlong_target(overlong: Literal["trim", "drop", "no_eos"], expected: Any) -> None:
    assert fit_lengths([7, 8, 9], [5, 5, 5, 5], 1, lengths=(4, 3), overlong=overlong) == expected


@pytest.mark.parametrize("overlong", ["trim", "drop", "no_eos"])
def test_what_fits_exactly_keeps_its_eos(overlong: Literal["trim", "drop", "no_eos"]) -> None:
    assert fit_lengths([7, 8, 9], [5, 5], 1, lengths=(4, 3), overlong=overlong) == ((7, 8, 9, 1), (5, 5, 1), False)


def test_overlong_inputs_always_end_in_eos() -> None:
    fitted = fit_lengths([7] * 9, [5], 1, lengths=(4, 3), overlong="no_eos")
    assert fitted == ((7, 7, 7, 1), (5, 1), False)


def test_efficiency_counts_tokens_over_room() -> None:
    packer, stats = Packer(8, 4), PackingStats()
    for item in (example(4, 2), example(4, 1), example(8, 4)):
        row = packer.add(item)
        if row is not None:
            stats.see_row(row, packer)
    assert stats.efficiency() == (1.0, 0.75)
    assert (stats.counts["rows"], stats.counts["examples"]) == (1, 2)
