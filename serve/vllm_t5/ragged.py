"""Encoder self-attention over texts that stand one after the other: nothing is padded outside the attention call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.vllm_t5.bias import encoder_line, encoder_square

SHARED_LENGTHS = (8, 16, 32, 64, 128)  # shorter texts share a call, padded to the longest of their class
QUERIES_A_CALL = 512  # of a long text on a GPU, whose kernels need the bias of a call written out


@dataclass(frozen=True, slots=True)
class _Shared:
    """Texts of about one length in one call.

    `gather` [texts * length] are token numbers (padding repeats a text's first token), `places` the numbers of the real
    tokens among them, `tokens` their numbers in the batch, `mask` [1 or texts, heads, length, length].
    """

    texts: int
    length: int
    gather: Tensor
    places: Tensor
    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _Long:
    """One text; `mask` [heads, length, length] has its keys last first."""

    start: int
    length: int
    mask: Tensor


class RaggedAttention:
    """Attention within each of the texts of a batch; made once and used by every layer of the encoder."""

    def __init__(self, lengths: Sequence[int], weight: Tensor, *, max_distance: int) -> None:
        """`lengths` of the texts in tokens; `weight` [buckets, heads] the bias of this rank's heads."""
        classes: dict[int, list[tuple[int, int]]] = {}
        self._groups: list[_Shared | _Long] = []
        start = 0
        for length in lengths:
            limit = next((limit for limit in SHARED_LENGTHS if length <= limit), None)
            if limit is None:
                line = encoder_line(weight, length, max_distance=max_distance)
                self._groups.append(_Long(start, length, encoder_square(line, length)))
            else:
                classes.setdefault(limit, []).append((start, length))
            start += length
        self._groups += [_shared(texts, weight, max_distance) for texts in classes.values()]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens, heads, d_kv] each -> [tokens, heads, d_kv]; T5 does not scale its scores."""
        out = torch.empty_like(query)
        for group in self._groups:
            if isinstance(group, _Long):
                part = slice(group.start, group.start + group.length)
                out[part] = _attend_long(query[part], key[part], value[part], group.mask)
            else:
                shape = (group.texts, group.length, *query.shape[1:])
                q, k, v = (x[group.gather].view(shape).transpose(1, 2) for x in (query, key, value))
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=1.0)
                out[group.tokens] = attended.transpose(1, 2).flatten(0, 1)[group.places]
        return out


def _attend_long(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One text [length, heads, d_kv]; `mask` [heads, length, length] with reversed keys."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key.flip(0), value.flip(0)))
    if not query.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(0), scale=1.0)[0].transpose(0, 1)
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, start : start + QUERIES_A_CALL],
            k,
            v,
            attn_mask=mask[:, start : start + QUERIES_A_CALL].contiguous().unsqueeze(0),
            scale=1.0,
        )
        for start in range(0, query.shape[0], QUERIES_A_CALL)
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _shared(texts: list[tuple[int, int]], weight: Tensor, max_distance: int) -> _Shared:
    """The call for `texts`, each (first token's number, tokens)."""
    length = max(size for _, size in texts)
    starts = torch.tensor([start for start, _ in texts])
    sizes = torch.tensor([size for _, size in texts])
    positions = torch.arange(length)
    real = positions < sizes[:, None]  # [texts, length]
    gather = starts[:, None] + torch.where(real, positions, 0)
    square = encoder_square(encoder_line(weight, length, max_distance=max_distance), length)
    mask = square.flip(-1).unsqueeze(0)
    if not bool(real.all()):
        blocked = torch.zeros(real.shape).masked_fill_(~real, -math.inf).to(mask)
        mask = mask + blocked[:, None, None, :]
    return _Shared(
        texts=len(texts),
        length=length,
        gather=gather.flatten().to(weight.device),
        places=real.flatten().nonzero().squeeze(1).to(weight.device),
        tokens=gather[real].to(weight.device),
        mask=mask.contiguous(),
    )
