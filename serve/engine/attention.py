"""Attention over ragged batches: tokens of several texts one after the other, nothing padded outside attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.layers import RelativeBias

PADDED_LENGTHS = (8, 16, 32, 64, 128)  # shorter texts share one padded attention call; longer ones have their own


class RaggedAttend(Protocol):
    """Self-attention within each text of a batch: q, k, v [tokens, heads, d_kv] -> [tokens, heads, d_kv]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Padded:
    """Several texts of about one length, padded to it inside the attention call only.

    `mask` is [texts or 1, heads, length, length]. Texts of one length that stand together are `run`, a part of the
    batch. For others `gather` [texts * length] are token numbers of the batch (padding repeats a text's first),
    `places` are the real tokens' positions among them and `tokens` their numbers.
    """

    texts: int
    length: int
    mask: Tensor
    run: slice | None
    gather: Tensor
    places: Tensor
    tokens: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Fill these texts' rows of `out`; all are [tokens of the batch, heads, d_kv]."""
        shape = (self.texts, self.length, *q.shape[1:])
        picked = self.gather if self.run is None else self.run
        query, key, value = (x[picked].view(shape).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=1.0).transpose(1, 2)
        if self.run is None:
            out[self.tokens] = attended.flatten(0, 1)[self.places]
        else:
            out[self.run].view(shape).copy_(attended)


@dataclass(frozen=True, slots=True)
class _Alone:
    """One text; `mask` [1, heads, length, length] has its keys last first (RelativeBias.reversed_square)."""

    start: int
    length: int
    mask: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """As _Padded."""
        part = slice(self.start, self.start + self.length)
        query = q[part].transpose(0, 1).unsqueeze(0)
        key, value = (x[part].flip(0).transpose(0, 1).unsqueeze(0) for x in (k, v))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=1.0)
        out[part] = attended.squeeze(0).transpose(0, 1)


class RaggedAttention:
    """Self-attention within each of `lengths` texts, for all layers of one stack."""

    def __init__(self, lengths: Sequence[int], bias: RelativeBias, *, causal: bool, device: torch.device) -> None:
        self._causal = causal
        self._groups: list[_Padded | _Alone] = []
        members: dict[int, list[tuple[int, int]]] = {}  # padded length -> (start, length) of its texts
        squares: dict[int, Tensor] = {}  # one mask a length
        start = 0
        for length in lengths:
            padded = next((limit for limit in PADDED_LENGTHS if length <= limit), None)
            if padded is None:
                if length not in squares:
                    squares[length] = _for_kernel(bias.reversed_square(length))
                self._groups.append(_Alone(start, length, squares[length]))
            else:
                members.setdefault(padded, []).append((start, length))
            start += length
        for texts in members.values():
            self._groups.append(_padded_group(texts, bias, causal=causal, device=device))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: [tokens, heads, d_kv] -> [tokens, heads, d_kv]."""
        out = torch.empty_like(q)
        for group in self._groups:
            group(q, k, v, out)
        return out


def _padded_group(texts: list[tuple[int, int]], bias: RelativeBias, *, causal: bool, device: torch.device) -> _Padded:
    length = max(size for _, size in texts)
    starts = torch.tensor([start for start, _ in texts])
    sizes = torch.tensor([size for _, size in texts])
    positions = torch.arange(length)
    real = positions[None, :] < sizes[:, None]  # [texts, length]
    gather = starts[:, None] + torch.where(real, positions[None, :], 0)
    mask = bias.at((positions[None, :] - positions[:, None]).to(device)).unsqueeze(0)
    if not causal and not bool(real.all()):  # causal queries never see the padding, which comes last
        blocked = torch.zeros(real.shape).masked_fill_(~real, -math.inf).to(device=device, dtype=mask.dtype)
        mask = mask + blocked[:, None, None, :]
    together = all(start == texts[0][0] + number * length for number, (start, _) in enumerate(texts))
    return _Padded(
        texts=len(texts),
        length=length,
        mask=mask.contiguous(),
        run=slice(texts[0][0], texts[0][0] + len(texts) * length) if together and bool(real.all()) else None,
        gather=gather.flatten().to(device),
        places=real.flatten().nonzero().squeeze(1).to(device),
        tokens=gather[real].to(device),
    )


def _for_kernel(mask: Tensor) -> Tensor:
    """CUDA's fused kernels want aligned rows, which overlapping strides cannot give; the CPU's take any strides."""
    return mask.contiguous() if mask.is_cuda else mask
