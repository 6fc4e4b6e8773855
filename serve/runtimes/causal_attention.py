"""Attention of decoder-only models over our own cache, hooked into transformers as one more attention implementation.

transformers computes everything but attention on packed tokens [1, T, ...] without padding; each attention layer
calls `attend`, which hands queries, keys and values to what the running step has prepared (`using`). A prompt's keys
and values, but for those of its last token, lie in the cross pool and are shared by all its sequences; the last
prompt token is the first input of each sequence, whose own keys and values lie in the self pool.

Shapes: T tokens or B sequences, Hq query heads, H key/value heads, G = Hq / H, D per head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.cache_tensors import CacheTensors
from serve.engine.sequence import Prompt, Sequence
from serve.engine.slabs import Slabs

IMPLEMENTATION = "flan_cached"  # the name transformers knows `attend` by
_SHARED_WIDTH = 4  # prompts with more sequences than this get a product of their own, not padding for the others
_UNSUPPORTED = ("softcap", "s_aux")  # what some models ask of their attention and this one does not do


class StepAttention(Protocol):
    """What a step has prepared: attention of its packed tokens."""

    def __call__(self, layer: int, q: Tensor, keys_values: Tensor, scale: float, window: int | None) -> Tensor:
        """q [T, Hq, D] and keys_values [T, 2, H, D] of the step's tokens -> [T, Hq, D]; stores keys and values.

        `window`: a token attends to itself and the `window` - 1 before it; None: to all before it.
        """
        ...


_step: ContextVar[StepAttention] = ContextVar("step attention")


@contextmanager
def using(attention: StepAttention) -> Iterator[None]:
    """Within the context, models with our attention implementation attend through `attention`."""
    token = _step.set(attention)
    try:
        yield
    finally:
        _step.reset(token)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, Hq, T, D], [1, H, T, D] twice -> [1, T, Hq, D].

    Raises:
        NotImplementedError: the model's attention has a part that this one lacks.
    """
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = _step.get()(module.layer_idx, q, torch.stack((k, v), dim=1), scale, sliding_window)
    return out[None], None


class PrefillAttention:
    """Whole prompts laid one after the other, each causal in itself; fills their rows."""

    def __init__(self, rows: SequenceOf[Tensor]) -> None:
        """`rows`: each prompt's cache [layers, 2, H, length, D]; its length is the number of its tokens here."""
        self._rows = rows

    def __call__(self, layer: int, q: Tensor, keys_values: Tensor, scale: float, window: int | None) -> Tensor:
        lengths = [row.shape[3] for row in self._rows]
        parts = []
        for row, part, fresh in zip(
            self._rows, torch.split(q, lengths), torch.split(keys_values, lengths), strict=True
        ):
            cached = row[layer]
            cached.copy_(fresh.permute(1, 2, 0, 3))
            parts.append(_causal(part, *cached.unbind(0), scale=scale, window=window))
        return torch.cat(parts)


class ForcedAttention:
    """Given continuations of one prompt, laid one after the other; each sees the prompt and itself. Stores nothing."""

    def __init__(self, prompt: Tensor, lengths: SequenceOf[int]) -> None:
        """`prompt`: its cache [layers, 2, H, prompt tokens - 1, D]; `lengths`: tokens of each continuation."""
        self._prompt = prompt
        self._lengths = list(lengths)

    def __call__(self, layer: int, q: Tensor, keys_values: Tensor, scale: float, window: int | None) -> Tensor:
        prompt = self._prompt[layer]
        parts = []
        pairs = zip(torch.split(q, self._lengths), torch.split(keys_values, self._lengths), strict=True)
        for part, fresh in pairs:
            key, value = torch.cat((prompt, fresh.permute(1, 2, 0, 3)), dim=2).unbind(0)
            parts.append(_causal(part, key, value, scale=scale, window=window))
        return torch.cat(parts)


def _causal(q: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Attention of the last tokens of a text: q [n, Hq, D], key and value [H, length, D] -> [n, Hq, D]."""
    count, length = q.shape[0], key.shape[1]
    mask = None
    if count < length or (window is not None and length > window):
        distance = torch.arange(length - count, length, device=q.device)[:, None] - torch.arange(
            length, device=q.device
        )
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != key.shape[0],
    )
    return out[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _OwnPart:
    """The sequences of one capacity, rows `start`..`stop` - 1 of the batch, with their own tokens' cache.

    slab [layers, rows, 2, H, capacity, D]; rows, positions [n].
    """

    start: int
    stop: int
    length: int
    slab: Tensor
    rows: Tensor
    positions: Tensor

    def score(self, layer: int, q: Tensor, keys_values: Tensor, scores: Tensor) -> None:
        """Store the new keys and values, and write the products with q [B, H, G, D] into scores [B, H, G, ≥ length]."""
        cache, part = self.slab[layer], slice(self.start, self.stop)
        cache[self.rows, :, :, self.positions] = keys_values[part]
        key = cache[: self.stop - self.start, 0, :, : self.length]
        scores[part, :, :, : self.length] = q[part] @ key.transpose(-1, -2)

    def add_values(self, layer: int, weights: Tensor, out: Tensor) -> None:
        part = slice(self.start, self.stop)
        value = self.slab[layer, : self.stop - self.start, 1, :, : self.length]
        out[part] += weights[part, :, :, : self.length] @ value


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """Prompts of one capacity, each with up to `width` sequences.

    slab [layers, prompts, 2, H, capacity, D]; `sources` [prompts * width] batch rows, padded with any; `filled` are
    the places of it that are real, `targets` their batch rows.
    """

    slab: Tensor
    width: int
    length: int
    sources: Tensor
    filled: Tensor
    targets: Tensor

    def score(self, layer: int, q: Tensor, scores: Tensor) -> None:
        heads, group, dim = q.shape[1:]
        picked = q[self.sources].view(-1, self.width, heads, group, dim).transpose(1, 2)
        key = self.slab[layer, :, 0, :, : self.length]
        products = picked.reshape(-1, heads, self.width * group, dim) @ key.transpose(-1, -2)
        products = products.view(-1, heads, self.width, group, self.length).transpose(1, 2).flatten(0, 1)
        scores[self.targets, :, :, : self.length] = products[self.filled]

    def add_values(self, layer: int, weights: Tensor, out: Tensor) -> None:
        heads, group = weights.shape[1:3]
        picked = weights[self.sources, :, :, : self.length].view(-1, self.width, heads, group, self.length)
        value = self.slab[layer, :, 1, :, : self.length]
        sums = picked.transpose(1, 2).reshape(-1, heads, self.width * group, self.length) @ value
        sums = sums.view(-1, heads, self.width, group, sums.shape[-1]).transpose(1, 2).flatten(0, 1)
        out[self.targets] += sums[self.filled]


class DecodeAttention:
    """One token of each running sequence, over its prompt's cache and its own."""

    def __init__(
        self,
        sequences: SequenceOf[Sequence],
        prompts: SequenceOf[Prompt],
        cache: CacheTensors[Slabs],
        device: torch.device,
    ) -> None:
        """`sequences` and `prompts` are in the order of their pools: by capacity, then row."""
        self._device = device
        self._prompt_lengths = self._tensor([len(s.prompt_ids) - 1 for s in sequences])
        self._positions = self._tensor([s.position for s in sequences])
        self._prompt_width = max(len(s.prompt_ids) - 1 for s in sequences)
        self._own_width = max(s.position for s in sequences) + 1
        self._own = list(self._own_parts(sequences, cache))
        self._prompts = [part for part in self._prompt_parts(sequences, prompts, cache) if part.length > 0]
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, keys_values: Tensor, scale: float, window: int | None) -> Tensor:
        batch, heads, dim = q.shape
        kv_heads = keys_values.shape[2]
        grouped = (q * scale).view(batch, kv_heads, heads // kv_heads, dim)
        scores = q.new_empty((batch, kv_heads, heads // kv_heads, self._prompt_width + self._own_width))
        before, own = torch.split(scores, [self._prompt_width, self._own_width], dim=-1)
        for part in self._prompts:
            part.score(layer, grouped, before)
        for one in self._own:
            one.score(layer, grouped, keys_values, own)
        # What nobody has written is masked, too: such memory may hold anything.
        weights = scores.masked_fill_(self._mask(window), -math.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
        before, own = torch.split(weights, [self._prompt_width, self._own_width], dim=-1)
        out = torch.zeros_like(grouped)
        for part in self._prompts:
            part.add_values(layer, before, out)
        for one in self._own:
            one.add_values(layer, own, out)
        return out.view(batch, heads, dim)

    def _mask(self, window: int | None) -> Tensor:
        """Where a sequence must not look: [B, 1, 1, prompt width + own width]."""
        if window not in self._masks:
            lengths, positions = self._prompt_lengths[:, None], self._positions[:, None]
            before = torch.arange(self._prompt_width, device=self._device)[None, :]
            own = torch.arange(self._own_width, device=self._device)[None, :]
            blocked_before, blocked_own = before >= lengths, own > positions
            if window is not None:
                blocked_before = blocked_before | (lengths + positions - before >= window)
                blocked_own = blocked_own | (positions - own >= window)
            self._masks[window] = torch.cat((blocked_before, blocked_own), dim=1)[:, None, None, :]
        return self._masks[window]

    def _own_parts(self, sequences: SequenceOf[Sequence], cache: CacheTensors[Slabs]) -> Iterator[_OwnPart]:
        start = 0
        for capacity, members in groupby(sequences, key=_capacity):
            places = [sequence.position for sequence in members]
            yield _OwnPart(
                start=start,
                stop=start + len(places),
                length=max(places) + 1,
                slab=cache.self_rows[capacity],
                rows=torch.arange(len(places), device=self._device),
                positions=self._tensor(places),
            )
            start += len(places)

    def _prompt_parts(
        self, sequences: SequenceOf[Sequence], prompts: SequenceOf[Prompt], cache: CacheTensors[Slabs]
    ) -> Iterator[_PromptPart]:
        users: dict[int, list[int]] = {id(prompt): [] for prompt in prompts}
        for row, sequence in enumerate(sequences):
            users[id(sequence.prompt)].append(row)
        for capacity, iterator in groupby(prompts, key=_capacity):
            members = list(iterator)
            rows = [users[id(prompt)] for prompt in members]
            lengths = [len(prompt.token_ids) - 1 for prompt in members]
            slab = cache.cross_rows[capacity]
            narrow = [own if len(own) <= _SHARED_WIDTH else [] for own in rows]
            if any(narrow):
                yield self._prompt_part(slab[:, : len(members)], narrow, max(lengths))
            for place, own in enumerate(rows):
                if len(own) > _SHARED_WIDTH:
                    yield self._prompt_part(slab[:, place : place + 1], [own], lengths[place])

    def _prompt_part(self, slab: Tensor, rows: list[list[int]], length: int) -> _PromptPart:
        width = max(len(own) for own in rows)
        sources: list[int] = []
        filled: list[int] = []
        for own in rows:
            filled += [len(sources) + place for place in range(len(own))]
            sources += own + [0] * (width - len(own))
        targets = [sources[place] for place in filled]
        return _PromptPart(slab, width, length, self._tensor(sources), self._tensor(filled), self._tensor(targets))

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)


def _capacity(holder: Sequence | Prompt) -> int:
    if holder.slot is None:
        raise ValueError("only holders of a row can be in a batch")
    return holder.slot.capacity
