"""A Triton kernel for self-attention within each of many texts laid one after the other, with T5's relative bias.

Chosen over scaled_dot_product_attention with a bias in length buckets (a handful of launches a text and layer: 16
texts in 24 layers are thousands) and over FlexAttention (which needs torch.compile in the server, a compiler on the
machine, and a recompilation when shapes change; uncompiled it holds all scores of the batch). This reads the bias out
of its table of distances, pads nothing but the last block of each text, and is one launch a layer.
"""

# A kernel's arguments are what they are, and its compile-time ones are written large, as in Triton's own.
# ruff: noqa: N803, PLR0913, PLR0917

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from serve.engine.layers import RelativeBias
from serve.engine.transfer import to_device

# Queries a program, and keys at a time. Exact float32 products run outside the tensor cores, and larger tiles of them
# do not fit the registers (compiled for sm_90: 64 x 64 spills 7.8 KB a thread, 32 x 32 nothing).
_TILE, _TILE_FLOAT32 = 64, 32


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    out,
    table,
    blocks,
    stride_t,
    stride_out,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (block, head): a block of one text's queries against all of the text's keys, softmax online.

    `blocks` [blocks, 3] int32: where the text starts, how long it is, which of its queries is the block's first.
    `table` [heads, 2 * LAST + 1] float32 is the bias by key position minus query position, -LAST..LAST. Products add
    up in float32. WIDEN has them made in float32 too: Triton's interpreter has no bfloat16 product.
    """
    block = blocks + tl.program_id(0) * 3
    head = tl.program_id(1)
    begin = tl.load(block).to(tl.int64)
    length = tl.load(block + 1)
    first = tl.load(block + 2)
    rows = first + tl.arange(0, TILE)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    here = (begin + rows)[:, None]
    real_rows = (rows < length)[:, None] & inside[None, :]
    q = tl.load(query + here * stride_t + head * WIDTH + column[None, :], mask=real_rows, other=0.0)
    best = tl.full((TILE,), -float("inf"), tl.float32)
    weight = tl.zeros((TILE,), dtype=tl.float32)
    total = tl.zeros((TILE, PADDED), dtype=tl.float32)
    bias = table + head * (2 * LAST + 1) + LAST
    end = length
    if CAUSAL:
        end = tl.minimum(length, first + TILE)
    for start in range(0, end, TILE):
        keys = start + tl.arange(0, TILE)
        there = (begin + keys)[:, None] * stride_t + head * WIDTH + column[None, :]
        real = (keys < length)[:, None] & inside[None, :]
        k = tl.load(key + there, mask=real, other=0.0)
        v = tl.load(value + there, mask=real, other=0.0)
        if WIDEN:
            score = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32), input_precision="ieee")
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
        distance = keys[None, :] - rows[:, None]
        score += tl.load(bias + tl.minimum(tl.maximum(distance, -LAST), LAST))
        score = tl.where((keys < length)[None, :], score, -float("inf"))
        top = tl.maximum(best, tl.max(score, axis=1))
        share = tl.exp(score - top[:, None])
        shrink = tl.exp(best - top)
        weight = weight * shrink + tl.sum(share, axis=1)
        narrow = share.to(v.dtype)
        if WIDEN:
            product = tl.dot(narrow.to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot(narrow, v, input_precision="ieee")
        total = total * shrink[:, None] + product
        best = top
    result = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + here * stride_out + head * WIDTH + column[None, :], result, mask=real_rows)


class RaggedKernel:
    """Self-attention within each of `lengths` texts, for all layers of one stack: attention.RaggedAttention's twin."""

    def __init__(self, lengths: Sequence[int], table: Tensor, *, causal: bool, dtype: torch.dtype) -> None:
        """`table` is `bias_table`'s; `dtype` that of queries, keys and values."""
        self._tile = _TILE_FLOAT32 if dtype is torch.float32 else _TILE
        blocks: list[tuple[int, int, int]] = []
        start = 0
        for length in lengths:
            blocks += [(start, length, first) for first in range(0, length, self._tile)]
            start += length
        # One tensor: Triton compiles anew for an address that is aligned differently, which slices of one may be.
        self._blocks = to_device(blocks, table.device, dtype=torch.int32)
        self._table = table
        self._causal = causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [tokens, heads, d_kv], of one stride -> [tokens, heads, d_kv]."""
        tokens, heads, width = q.shape
        out = torch.empty((tokens, heads, width), device=q.device, dtype=q.dtype)
        _attend[(self._blocks.shape[0], heads)](
            q, k, v, out, self._table, self._blocks, q.stride(0), out.stride(0),
            CAUSAL=self._causal, WIDEN=not q.is_cuda, LAST=self._table.shape[1] // 2, WIDTH=width,
            PADDED=max(16, triton.next_power_of_2(width)), TILE=self._tile, enable_fp_fusion=True,
        )  # fmt: skip
        return out


def bias_table(bias: RelativeBias, max_distance: int, device: torch.device) -> Tensor:
    """[heads, 2 * max_distance + 1] float32: the bias by key position minus query position."""
    return bias.at(torch.arange(-max_distance, max_distance + 1, device=device)).float().contiguous()
