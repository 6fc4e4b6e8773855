"""The kernels against their definitions. Run by test_triton.py, through the interpreter or on a card."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from serve.engine.attention import RaggedAttention
from serve.engine.gpu import decode_kernels, ragged_kernel
from serve.engine.gpu.decode_kernels import KEYS_A_TURN, CachedKeys
from serve.engine.gpu.page_table import PAGE
from serve.engine.layers import RelativeBias
from tests.engine.gpu.devices import DEVICE

CPU = torch.device("cpu")
HEADS, WIDTH = 3, 24  # no powers of two
LAST = 32  # the largest distance in the bias' table
MAX_LENGTH = 512
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Batch:
    """Rows over a paged cache full of NaN but for their keys, which lie on pages in no order.

    Row i has `stored[i]` keys, and those of row `shares[i]` where it is in there. Page 0 is the padding's.
    """

    def __init__(self, stored: list[int], dtype: torch.dtype, *, shares: dict[int, int] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.stored, self.first = stored, [0] * len(stored)
        wanted = [count // PAGE + 1 for count in stored]
        numbers = torch.randperm(sum(wanted), generator=generator) + 1
        self.pages = torch.cat((torch.zeros(1), numbers)).int()
        self.cache = torch.full((len(self.pages), 2, HEADS, PAGE, WIDTH), math.nan, dtype=dtype)
        filled = 1
        for row, count in enumerate(stored):
            self.first[row] = filled
            filled += wanted[row]
            for position in range(count):
                self.cache[self.place(row, position)] = torch.randn(2, HEADS, WIDTH, generator=generator).to(dtype)
        for row, other in (shares or {}).items():
            self.first[row] = self.first[other]
        qkv = torch.randn(len(stored), 3, HEADS, WIDTH, generator=generator).to(dtype)
        self.q, self.keys_values = qkv[:, 0], qkv[:, 1:]
        self.table = torch.randn(HEADS, LAST + 1, generator=generator)
        self.qkv, self.on_device = qkv.to(DEVICE), self.cache.to(DEVICE)

    def pad(self) -> None:
        """Make the last row a row of padding."""
        self.first[-1], self.stored[-1] = 0, 0

    @property
    def keys(self) -> CachedKeys:
        first, stored = (
            torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in (self.first, self.stored)
        )
        return CachedKeys(self.pages.to(DEVICE), first, stored)

    def place(self, row: int, position: int) -> tuple[int, slice, slice, int]:
        page = int(self.pages[self.first[row] + position // PAGE])
        return page, slice(None), slice(None), position % PAGE

    def self_attention(self, splits: int) -> Tensor:
        q, keys_values = self.qkv[:, 0], self.qkv[:, 1:]
        return decode_kernels.self_attention(
            q, keys_values, self.on_device, self.table.to(DEVICE), self.keys, splits=splits
        ).cpu()

    def cross_attention(self, splits: int) -> Tensor:
        return decode_kernels.cross_attention(self.qkv[:, 0], self.on_device, self.keys, splits=splits).cpu()

    def attended(self, row: int, count: int, bias: Tensor | float) -> Tensor:
        """What a row gets from its first `count` positions, by definition: [HEADS, WIDTH] float32."""
        both = torch.stack([self.cache[self.place(row, position)] for position in range(count)]).float()
        scores = torch.einsum("hd,khd->hk", self.q[row].float(), both[:, 0]) + bias
        return torch.einsum("hk,khd->hd", scores.softmax(-1), both[:, 1])


def same(got: Tensor, want: Tensor) -> bool:
    """Equal, NaN for NaN."""
    return torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


# A first step, both sides of a page's and of a turn's edge (the row's own key is one more), both sides of the table's
# end, the last position of a capacity.
SELF_LENGTHS = [0, 1, PAGE - 1, PAGE, LAST, LAST + 1, KEYS_A_TURN - 1, KEYS_A_TURN, KEYS_A_TURN + 1, MAX_LENGTH - 1, 0]


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_self_attention(dtype: torch.dtype, splits: int) -> None:
    batch = Batch(list(SELF_LENGTHS), dtype)
    batch.pad()
    got = batch.self_attention(splits)
    assert got.dtype is dtype
    for row, count in enumerate(batch.stored):
        batch.cache[batch.place(row, count)] = batch.keys_values[row]
        distance = (count - torch.arange(count + 1)).clamp(max=LAST)
        want = batch.attended(row, count + 1, batch.table[:, distance])
        torch.testing.assert_close(got[row].float(), want, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert same(batch.on_device.cpu(), batch.cache), "its own keys and values stand in the cache, and no others"


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_cross_attention(dtype: torch.dtype, splits: int) -> None:
    """The last row but one shares the prompt of the one before it; the last is padding, and gets 0."""
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, KEYS_A_TURN - 1, KEYS_A_TURN, KEYS_A_TURN + 1, MAX_LENGTH, 100, 100, 0]
    batch = Batch(lengths, dtype, shares={9: 8})
    batch.pad()
    got = batch.cross_attention(splits)
    assert got.dtype is dtype
    for row, count in enumerate(batch.stored):
        want = batch.attended(row, count, 0.0) if count else torch.zeros(HEADS, WIDTH)
        torch.testing.assert_close(got[row].float(), want, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert same(batch.on_device.cpu(), batch.cache)


@pytest.mark.parametrize("splits", [1, 8])
def test_a_row_does_not_depend_on_the_others(splits: int) -> None:
    """Bit for bit, as long as its keys are split alike: the kernel's part of alone-equals-in-a-crowd."""
    crowd = Batch([3, 40, 100], torch.float32)
    got = crowd.self_attention(splits)
    for row in range(3):
        alone = Batch([3, 40, 100], torch.float32)
        alone.qkv = alone.qkv[row : row + 1]
        alone.first, alone.stored = [alone.first[row]], [alone.stored[row]]
        assert torch.equal(alone.self_attention(splits)[0], got[row])


def test_splits_fill_the_processors() -> None:
    assert [decode_kernels.splits_for(rows, 32, 132) for rows in (1, 2, 4, 8, 64)] == [8, 4, 2, 1, 1]
    assert decode_kernels.splits_for(1, 6, 132) == decode_kernels.MAX_SPLITS
    assert decode_kernels.splits_for(3, 4, 1) == 1


def ragged(causal: bool, dtype: torch.dtype = torch.float32) -> tuple[list[int], RelativeBias, Tensor]:
    """Lengths on both sides of both tiles' edges (32 and 64), and beyond the bias' largest distance."""
    generator = torch.Generator().manual_seed(2)
    lengths = [1, 7, 31, 32, 33, 63, 64, 65, 200, 130]
    weight = torch.randn(32, HEADS, generator=generator) * 1.5
    bias = RelativeBias(weight, max_distance=128, causal=causal, device=CPU, dtype=dtype)
    return lengths, bias, torch.randn(sum(lengths), 3, HEADS, WIDTH, generator=generator).to(dtype)


def attend(lengths: list[int], table: Tensor, qkv: Tensor, *, causal: bool) -> Tensor:
    kernel = ragged_kernel.RaggedKernel(lengths, table.to(DEVICE), causal=causal, dtype=qkv.dtype)
    return kernel(*qkv.to(DEVICE).unbind(1)).cpu()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_ragged_attention(dtype: torch.dtype, causal: bool) -> None:
    lengths, bias, qkv = ragged(causal, dtype)
    table = ragged_kernel.bias_table(bias, 128, CPU)
    got = attend(lengths, table, qkv, causal=causal)
    exact = RelativeBias.__new__(RelativeBias)
    exact._max_distance, exact._table = bias._max_distance, bias._table.float()
    want = RaggedAttention(lengths, exact, causal=causal, device=CPU)(*qkv.float().unbind(1))
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), want, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_ragged_attention_is_what_flex_attention_defines() -> None:
    """The same by a third way: one call for all texts, the bias and the borders between texts as a score's change."""
    lengths, bias, qkv = ragged(causal=False)
    table = ragged_kernel.bias_table(bias, 128, CPU)
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def change(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        biased = score + table[head, (key - query).clamp(-128, 128) + 128]
        return torch.where(text[query] == text[key], biased, -math.inf)

    query, key, value = (part.transpose(0, 1)[None] for part in qkv.unbind(1))
    want = flex_attention(query, key, value, score_mod=change, scale=1.0)
    assert isinstance(want, Tensor)
    got = attend(lengths, table, qkv, causal=False)
    torch.testing.assert_close(got, want[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
