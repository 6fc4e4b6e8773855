"""One thread or all for a decode step: by what was tried once, and never beyond the step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from serve.engine.model import T5Model
from serve.engine.thread_choice import ThreadChoice


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def threads_of(choice: ThreadChoice, rows: int) -> int:
    with choice(rows):
        return torch.get_num_threads()


def test_few_rows_take_one_thread_as_far_as_that_is_faster() -> None:
    """A row costs 1, and waking the others 2: so four threads pay from 4 rows on, 3 instead of 4."""
    choice = ThreadChoice(lambda rows, threads: (rows if threads == 1 else 2 + rows / threads) / 100)
    assert [threads_of(choice, rows) for rows in (1, 2, 3, 4, 8, 64)] == [1, 1, 4, 4, 4, 4]
    assert torch.get_num_threads() == 4


def test_all_threads_have_to_be_worth_what_they_keep_from_others() -> None:
    """Four threads save 7.5 ms for each row; worth 20 ms, they begin at three rows."""
    choice = ThreadChoice(lambda rows, threads: rows * (0.01 if threads == 1 else 0.0025), worth_seconds=0.02)
    assert [threads_of(choice, rows) for rows in (1, 2, 3, 4, 8)] == [1, 1, 4, 4, 4]


def test_all_threads_where_they_always_pay() -> None:
    choice = ThreadChoice(lambda rows, threads: rows / threads / 1000)
    assert [threads_of(choice, rows) for rows in (1, 32)] == [4, 4]


def test_a_big_model_is_not_tried_for_long() -> None:
    tried: list[tuple[int, int]] = []

    def seconds(rows: int, threads: int) -> float:
        tried.append((rows, threads))
        return 0.2

    assert threads_of(ThreadChoice(seconds), 1) == 4
    assert tried == [(1, 1)]


def test_one_thread_is_no_choice() -> None:
    torch.set_num_threads(1)
    choice = ThreadChoice(lambda rows, threads: pytest.fail("nothing to try"))
    assert threads_of(choice, 1) == 1


def test_an_error_in_a_step_leaves_all_threads() -> None:
    choice = ThreadChoice(lambda rows, threads: float(threads) / 100)

    def step() -> None:
        with choice(1):
            assert torch.get_num_threads() == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        step()
    assert torch.get_num_threads() == 4


def test_a_model_is_tried_as_it_is(model: T5Model) -> None:
    choice = ThreadChoice.of(model)
    assert threads_of(choice, 1) in (1, 4)
    assert threads_of(choice, 64) == 4


def test_threads_change_no_bit(model: T5Model) -> None:
    """Else a text could depend on what was tried."""
    prompt = torch.arange(2, 52)
    states = model.encode(prompt, [50])
    cross = [keys_values.permute(1, 2, 0, 3) for keys_values in model.cross_keys_values(states)]
    texts = torch.arange(3, 43)
    logits = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        logits.append(model.logits(model.decode_forced(texts, [20, 20], cross)))
    assert torch.equal(*logits)
