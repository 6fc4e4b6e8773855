"""One step's decode attention over the cache: where each sequence reads and writes, prepared once for all layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from serve.engine.cache_tensors import CacheTensors
from serve.engine.cached_attention import CachedAttention, cached_attention
from serve.engine.layers import RelativeBias
from serve.engine.sequence import Prompt, Sequence
from serve.engine.slabs import Slabs

_SHARED_WIDTH = 4  # prompts with more sequences than this get a call of their own, not padding for all the others


@dataclass(frozen=True, slots=True)
class _SelfGroup:
    """The sequences of one capacity: rows `start`..`stop` - 1 of the batch, rows 0.. of the slab.

    `vectors`, a layer each: all of the slab as [2 * rows * heads * capacity, d_kv]; `places` [n, 2, heads] are where
    this step's keys and values go among them.
    """

    start: int
    stop: int
    vectors: tuple[Tensor, ...]
    places: Tensor
    attention: CachedAttention

    def attend(self, layer: int, q: Tensor, keys_values: Tensor) -> Tensor:
        """q [batch, heads, d_kv], keys_values [batch, 2, heads, d_kv] -> [n, heads * d_kv]."""
        if q.shape[0] > self.stop - self.start:
            q, keys_values = q[self.start : self.stop], keys_values[self.start : self.stop]
        self.vectors[layer].index_put_((self.places,), keys_values)
        return self.attention(layer, q.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class _CrossGroup:
    """Prompts of one capacity, each with up to `width` queries, one a sequence.

    `gather` [prompts * width] are batch rows, None when that is all of the batch in order.
    """

    width: int
    gather: Tensor | None
    attention: CachedAttention

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [batch, heads, d_kv] -> [prompts * width, heads * d_kv]."""
        picked = q if self.gather is None else q[self.gather]
        return self.attention(layer, picked.view(-1, self.width, *q.shape[1:]))


class DecodeBatch:
    """Implements model.DecodeAttention for one step.

    Holds no per-layer state; `input_ids` [batch] are the decoder inputs of this step.
    """

    def __init__(
        self,
        sequences: SequenceOf[Sequence],
        prompts: SequenceOf[Prompt],
        cache: CacheTensors[Slabs],
        bias: RelativeBias,
        *,
        start_token_id: int,
        device: torch.device,
    ) -> None:
        """`sequences` and `prompts` are in the order of their pools: by capacity, then row."""
        self._device = device
        inputs = [s.token_ids[s.position - 1] if s.position > 0 else start_token_id for s in sequences]
        self.input_ids = torch.tensor(inputs, device=device)
        self._self_groups = list(self._make_self_groups(sequences, cache, bias))
        self._cross_groups: list[_CrossGroup] = []
        self._merge = self._make_cross_groups(sequences, prompts, cache)

    def self_attention(self, layer: int, q: Tensor, keys_values: Tensor) -> Tensor:
        """[batch, heads, d_kv] and [batch, 2, heads, d_kv] -> [batch, heads * d_kv]."""
        parts = [group.attend(layer, q, keys_values) for group in self._self_groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        """[batch, heads, d_kv] -> [batch, heads * d_kv]."""
        parts = [group.attend(layer, q) for group in self._cross_groups]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if self._merge is None else out[self._merge]

    def _make_self_groups(
        self, sequences: SequenceOf[Sequence], cache: CacheTensors[Slabs], bias: RelativeBias
    ) -> Iterator[_SelfGroup]:
        start = 0
        for capacity, members in groupby(sequences, key=_capacity):
            places = [sequence.position for sequence in members]
            length = max(places) + 1
            positions = torch.tensor(places, device=self._device)
            distances = torch.arange(length, device=self._device)[None, :] - positions[:, None]
            slab = cache.self_rows.by_kind(capacity)
            kinds, rows, heads = slab.shape[1:4]
            offsets = torch.arange(kinds * rows * heads, device=self._device) * capacity
            offsets = offsets.view(kinds, rows, heads).transpose(0, 1)
            mask = bias.at(distances).transpose(0, 1).contiguous()
            yield _SelfGroup(
                start=start,
                stop=start + len(places),
                vectors=slab.flatten(1, 4).unbind(0),
                places=offsets[: len(places)] + positions[:, None, None],
                attention=cached_attention(slab[:, :, : len(places)], length, mask),
            )
            start += len(places)

    def _make_cross_groups(
        self, sequences: SequenceOf[Sequence], prompts: SequenceOf[Prompt], cache: CacheTensors[Slabs]
    ) -> Tensor | None:
        """Fill the cross groups; returns where each batch row's result is among theirs, None when in order."""
        users: dict[int, list[int]] = {id(prompt): [] for prompt in prompts}
        for row, sequence in enumerate(sequences):
            users[id(sequence.prompt)].append(row)
        places = [0] * len(sequences)  # batch row -> row of the concatenated results
        filled = 0
        for capacity, iterator in groupby(prompts, key=_capacity):
            members = list(iterator)
            rows = [users[id(prompt)] for prompt in members]
            wide = [i for i, queries in enumerate(rows) if len(queries) > _SHARED_WIDTH]
            narrow_width = max((len(queries) for queries in rows if len(queries) <= _SHARED_WIDTH), default=0)
            slices = [(slice(i, i + 1), len(rows[i])) for i in wide]
            if narrow_width > 0:
                slices.append((slice(0, len(members)), narrow_width))
            for part, width in slices:
                gather: list[int] = []
                for queries in rows[part]:
                    shown = queries if len(queries) <= width else []  # a wide prompt has its own call
                    for offset, row in enumerate(shown):
                        places[row] = filled + len(gather) + offset
                    gather += shown + [0] * (width - len(shown))
                slab = cache.cross_rows.by_kind(capacity)[:, :, part.start : part.stop]
                self._cross_groups.append(self._cross_group(slab, members[part], width, gather, len(sequences)))
                filled += len(gather)
        return None if places == list(range(filled)) else torch.tensor(places, device=self._device)

    def _cross_group(
        self, slab: Tensor, prompts: list[Prompt], width: int, gather: list[int], batch: int
    ) -> _CrossGroup:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        length = max(lengths)
        mask = None
        if min(lengths) < length:
            ends = torch.tensor(lengths, device=self._device)[:, None, None]
            blocked = torch.arange(length, device=self._device) >= ends  # [prompts, 1, length]
            mask = torch.zeros(blocked.shape, device=self._device, dtype=slab.dtype).masked_fill_(blocked, -math.inf)
            mask = mask.expand(-1, slab.shape[3], -1)
        in_order = gather == list(range(batch))
        return _CrossGroup(
            width=width,
            gather=None if in_order else torch.tensor(gather, device=self._device),
            attention=cached_attention(slab, length, mask),
        )


def _capacity(holder: Sequence | Prompt) -> int:
    if holder.slot is None:
        raise ValueError("only holders of a row can be in a batch")
    return holder.slot.capacity
