"""T5's relative position bias (Raffel et al. 2020, section 2.1; the buckets of mesh-tensorflow's T5).

One learned number per head and bucket is added to the score of a query and a key. Buckets are exact up to half of
their number and grow logarithmically up to `max_distance`; everything farther shares the last one. So the bias of a
decoder is a table over distances 0..max_distance, exact for any length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bucket_of(relative: Tensor, *, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each `relative` = key position - query position (int64, any shape); causal: keys ahead count as 0."""
    if bidirectional:
        buckets //= 2
        side = (relative > 0).long() * buckets
        distance = relative.abs()
    else:
        side = torch.zeros_like(relative)
        distance = (-relative).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return side + torch.where(distance < exact, distance, far)


def decoder_table(weight: Tensor, *, max_distance: int) -> Tensor:
    """[heads, max_distance + 1] float32: the bias by distance query - key; larger distances use the last column.

    `weight` is the checkpoint's [buckets, heads].
    """
    distance = torch.arange(max_distance + 1, device=weight.device)
    bucket = bucket_of(-distance, bidirectional=False, buckets=weight.shape[0], max_distance=max_distance)
    return weight.float()[bucket].t().contiguous()


def encoder_line(weight: Tensor, length: int, *, max_distance: int) -> Tensor:
    """[heads, 2 * length - 1] in the weight's dtype: the bias of key - query = length - 1, ..., -(length - 1)."""
    relative = torch.arange(length - 1, -length, -1, device=weight.device)
    bucket = bucket_of(relative, bidirectional=True, buckets=weight.shape[0], max_distance=max_distance)
    return weight[bucket].t().contiguous()


def encoder_square(line: Tensor, length: int) -> Tensor:
    """[heads, length, length] view of `line` (encoder_line): queries in order, *keys last first*.

    With the keys reversed, key - query falls by one along both axes, so overlapping strides serve and a text of any
    length needs 2 * length numbers a head, not length ** 2.
    """
    heads, width = line.shape
    return line.as_strided((heads, length, length), (width, 1, 1))
