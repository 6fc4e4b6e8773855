"""Rows with memory of their own: nothing is copied that need not be."""

from __future__ import annotations

import torch

from serve.engine.cache import CopyRow
from serve.engine.cache_tensors import CacheTensors, RowShape
from serve.engine.row_tensors import RowTensors
from serve.engine.spare_memory import SpareMemory

LAYERS, HEADS, D_KV = 2, 3, 16
TOKEN_BYTES = LAYERS * 2 * HEADS * D_KV * 2


def pool_of(used: dict[int, int], spare: SpareMemory | None = None) -> RowTensors:
    rows = RowTensors(RowShape(LAYERS, HEADS, D_KV, torch.float16), spare=spare or SpareMemory(1 << 30))
    rows.settle(used)
    return rows


def test_rows_are_where_their_addresses_and_steps_say() -> None:
    rows = pool_of({16: 3, 64: 1})
    for capacity, count in ((16, 3), (64, 1)):
        assert len(rows.addresses[capacity]) == count
        for number, address in enumerate(rows.addresses[capacity]):
            row = rows.row(capacity, number)
            assert row.shape == (LAYERS, 2, HEADS, capacity, D_KV)
            assert row.data_ptr() == address
            assert row.stride() == (*rows.steps(capacity), D_KV, 1)
    assert rows.allocated_bytes == (3 * 16 + 64) * TOKEN_BYTES


def test_growing_and_shrinking_leave_the_other_rows_alone() -> None:
    rows = pool_of({16: 2})
    rows.row(16, 0).fill_(1)
    rows.row(16, 1).fill_(2)
    before = list(rows.addresses[16])
    rows.settle({16: 40})
    assert rows.addresses[16][:2] == before
    rows.settle({16: 1, 32: 1})
    assert rows.addresses[16] == before[:1]
    assert (rows.row(16, 0) == 1).all()
    assert rows.allocated_bytes == (16 + 32) * TOKEN_BYTES
    rows.settle({})
    assert rows.allocated_bytes == 0
    assert not rows.addresses


def test_a_row_that_moves_takes_its_memory_with_it() -> None:
    own, cross = pool_of({16: 3}), pool_of({16: 1})
    for number in range(3):
        own.row(16, number).fill_(number)
    last = own.addresses[16][2]
    CacheTensors(own, cross).apply([CopyRow("self", (16, 2), (16, 0))])
    assert own.addresses[16][0] == last == own.row(16, 0).data_ptr()
    assert [float(own.row(16, number)[0, 0, 0, 0, 0]) for number in (0, 1)] == [2.0, 1.0]
    assert len(set(own.addresses[16])) == 3  # nobody's memory is anybody else's


def test_a_row_that_grows_is_copied() -> None:
    own, cross = pool_of({16: 1}), pool_of({16: 1})
    own.row(16, 0).copy_(torch.arange(16)[:, None].expand(LAYERS, 2, HEADS, 16, D_KV))
    before = own.row(16, 0).clone()
    CacheTensors(own, cross).apply([CopyRow("self", (16, 0), (32, 4))])
    assert torch.equal(own.row(32, 4)[..., :16, :], before)


def test_memory_goes_from_one_pool_to_the_other() -> None:
    spare = SpareMemory(1 << 30)
    own, cross = pool_of({16: 2}, spare), pool_of({}, spare)
    given = set(own.addresses[16])
    own.settle({})
    assert spare.kept_bytes == 2 * 16 * TOKEN_BYTES
    cross.settle({16: 2})
    assert set(cross.addresses[16]) == given
    assert spare.kept_bytes == 0
