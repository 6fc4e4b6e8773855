"""The same attention in plain torch, for a CPU: rows that decode one token share a call, longer rows have their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """Requests with equally many new tokens, attended together.

    `rows` [requests, queries] of the batch; `block`, `offset` [requests, keys] their places in the cache (beyond a
    request's keys: any place); `bias` [requests, heads, queries, keys] with -inf where a query must not look.
    """

    rows: Tensor
    block: Tensor
    offset: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """One step: its calls, and the bias table that they were made from."""

    calls: tuple[Call, ...]
    table: Tensor

    @classmethod
    def of(cls, starts: Tensor, keys: Tensor, pages: Tensor, block_size: int, table: Tensor) -> TorchPlan:
        """Group a batch into calls.

        Args:
            starts: [requests + 1] first row of each request, and the end of the last.
            keys: [requests] keys of each request, its new tokens included.
            pages: [requests, blocks] block numbers.
            table: [heads, max_distance + 1] the bias by distance.
        """
        first, last, length = starts[:-1].tolist(), starts[1:].tolist(), keys.tolist()
        single = [n for n in range(len(length)) if last[n] - first[n] == 1]
        groups = [single] if single else []
        groups += [[n] for n in range(len(length)) if last[n] - first[n] > 1]
        calls = []
        for group in groups:
            queries = last[group[0]] - first[group[0]]
            rows = torch.tensor([first[n] for n in group])[:, None] + torch.arange(queries)
            sizes = torch.tensor([length[n] for n in group])
            calls.append(_call(rows, sizes, pages[group].long(), block_size, table))
        return cls(tuple(calls), table)


def _call(rows: Tensor, sizes: Tensor, pages: Tensor, block_size: int, table: Tensor) -> Call:
    """`rows` [requests, queries]; `sizes` [requests] keys; `pages` [requests, blocks]."""
    queries = rows.shape[1]
    position = torch.arange(int(sizes.max()))
    query_position = sizes[:, None] - queries + torch.arange(queries)  # [requests, queries]
    distance = query_position[:, :, None] - position  # [requests, queries, keys]
    bias = table[:, distance.clamp(0, table.shape[1] - 1)].transpose(0, 1)
    bias = bias.masked_fill((distance < 0)[:, None], -math.inf)
    block = pages[:, position // block_size]
    return Call(rows, block, (position % block_size).expand_as(block), bias)


def write_keys_values(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """`key`, `value` [rows, heads, width] into `cache` [blocks, heads, block size, 2 * width]; slot -1 is padding."""
    rows = min(key.shape[0], slots.shape[0])
    slots = slots[:rows]
    both = torch.cat([key[:rows], value[:rows]], dim=-1)
    real = slots >= 0
    if not bool(real.all()):
        slots, both = slots[real], both[real]
    block_size = cache.shape[2]
    cache[slots // block_size, :, slots % block_size] = both.to(cache.dtype)


def attend(query: Tensor, cache: Tensor, plan: TorchPlan, out: Tensor) -> None:
    """softmax(q k + bias) v into `out` [rows, heads, width]; rows of no request get 0."""
    covered = 0
    for call in plan.calls:
        both = cache.transpose(1, 2)[call.block, call.offset]  # [requests, keys, heads, 2 * width]
        keys, values = both.transpose(1, 2).chunk(2, dim=-1)
        queries = query[call.rows].transpose(1, 2)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=call.bias.to(query.dtype), scale=1.0)
        out[call.rows] = attended.transpose(1, 2).to(out.dtype)
        covered += call.rows.numel()
    if covered < out.shape[0]:  # padding stands at the end
        out[covered:] = 0
