"""What is kept for later is used again, and has bounds."""

from __future__ import annotations

import torch

from serve.engine.spare_memory import SpareMemory


def test_what_is_given_is_taken_again_by_its_size() -> None:
    spare = SpareMemory(1 << 20)
    first, second, other = spare.take(64), spare.take(64), spare.take(128)
    assert [(memory.dtype, memory.nbytes) for memory in (first, other)] == [(torch.uint8, 64), (torch.uint8, 128)]
    for memory in (first, second, other):
        spare.give(memory)
    assert spare.kept_bytes == 256
    assert spare.take(64).data_ptr() == second.data_ptr()
    assert spare.take(64).data_ptr() == first.data_ptr()
    assert spare.take(64).data_ptr() not in {first.data_ptr(), second.data_ptr(), other.data_ptr()}
    assert spare.kept_bytes == 128


def test_an_eighth_of_the_budget_is_kept_at_most_and_the_size_given_longest_ago_goes_first() -> None:
    spare = SpareMemory(8 * 400)
    taken = [spare.take(size) for size in (100, 200, 100, 100)]
    for memory in taken[:2]:
        spare.give(memory)
    assert spare.kept_bytes == 300
    for memory in taken[2:]:
        spare.give(memory)  # 100 is young again, so 200 goes
    assert spare.kept_bytes == 300
    assert spare.take(200).data_ptr() != taken[1].data_ptr()
    spare.give(torch.empty(401, dtype=torch.uint8))  # more than may be kept, so nothing has to go for it
    assert spare.kept_bytes == 300
    assert spare.take(100).data_ptr() == taken[3].data_ptr()


def test_a_large_budget_keeps_no_more_than_128_mib() -> None:
    spare = SpareMemory(1 << 40)
    for memory in [spare.take(48 << 20) for _ in range(3)]:
        spare.give(memory)
    assert spare.kept_bytes == 2 * (48 << 20)
