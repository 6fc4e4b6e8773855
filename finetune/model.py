"""T5 for packed training: Hugging Face's tensor names, our own forward pass.

Hugging Face's T5 has one attention mask for encoder self-attention and cross-attention, so rows that hold several
examples cannot be trained with it. This one takes segment ids and builds the three masks. It is numerically equal to
theirs, its `state_dict()` has their names, and it does less work: states are kept for real tokens only, [tokens,
d_model], and spread out into rows for attention alone; one relative bias per stack and step; one product for q, k and
v; logits for the positions that carry loss only.

The three masks of a row that holds two examples (segments 1 1 1 2 2, then padding 0; `x` may look):

    encoder self-attention      decoder self-attention      cross-attention
    (same segment)              (same segment, not later)   (decoder segment = encoder segment)

          1 1 1 2 2 0                 1 1 2 2                       1 1 1 2 2 0   encoder
        1 x x x . . .               1 x . . .                     1 x x x . . .
        1 x x x . . .               1 x x . .                     1 x x x . . .
        1 x x x . . .               2 . . x .                     2 . . . x x .
        2 . . . x x .               2 . . x x                     2 . . . x x .
        2 . . . x x .                                       decoder
        0 . . . . . x

The relative bias depends on the distance of two positions only, so positions need not restart in a segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody knows)
from torch import Tensor, nn

from finetune.collate import PackedBatch
from finetune.config import ModelConfig

MASKED = -1e9  # finite: a row with nothing to look at (padding) gets even attention, never NaN


class T5(nn.Module):
    """Encoder-decoder T5 and T5 1.1. `forward` returns logits at the target positions that carry loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, config.num_layers, is_decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def set_dropout(self, rate: float) -> None:
        """The dropout rate of training mode; a phase of a run sets its own."""
        for module in self.modules():
            if isinstance(module, DropoutModule):
                module.dropout = rate

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits `[num_target_tokens, vocab]`, row by row: every target token that is no padding carries loss."""
        inputs, targets = Layout(batch.encoder_segment_ids), Layout(batch.decoder_segment_ids)
        mask = segment_mask(inputs.segments, inputs.segments)
        states = self.encoder(self.shared(inputs.take(batch.encoder_input_tokens)), inputs, mask, None)
        length = targets.segments.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
        mask = segment_mask(targets.segments, targets.segments).masked_fill(later, MASKED)
        encoded = Encoded(states, inputs, segment_mask(targets.segments, inputs.segments))
        return self.logits(self.decoder(self.shared(targets.take(batch.decoder_input_tokens)), targets, mask, encoded))

    def logits(self, hidden: Tensor) -> Tensor:
        """The head; T5 1.0's tied head reads scaled states, an untied one does not."""
        if self.config.tie_word_embeddings:
            return F.linear(hidden * self.config.d_model**-0.5, self.shared.weight)
        return F.linear(hidden, self.lm_head.weight)


class Layout:
    """Where the real tokens of packed rows are. States are `[tokens, size]`; attention needs `[rows, length, size]`.

    Segment ids [[1, 1, 0], [1, 2, 2]]: 5 tokens, at places 0 1 3 4 5 of 2 x 3.
    """

    def __init__(self, segments: Tensor) -> None:
        self.segments = segments
        self.places = segments.flatten().nonzero().squeeze(1)

    def take(self, spread: Tensor) -> Tensor:
        """`[rows, length, ...]` to `[tokens, ...]`."""
        return spread.flatten(0, 1).index_select(0, self.places)

    def spread(self, states: Tensor) -> Tensor:
        """`[tokens, size]` to `[rows, length, size]`, zeros on padding."""
        rows, length = self.segments.shape
        empty = states.new_zeros(rows * length, states.shape[1])
        return empty.index_copy(0, self.places, states).view(rows, length, -1)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the decoder reads of the encoder: states `[tokens, d_model]`, their places, the cross-attention mask."""

    states: Tensor
    layout: Layout
    mask: Tensor


class DropoutModule(nn.Module):
    """A module that drops out parts of its states in training; `T5.set_dropout` sets the rate of all."""

    dropout = 0.0

    def drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout) if self.training and self.dropout > 0 else hidden


class Stack(DropoutModule):
    """Encoder or decoder: blocks, a final norm, and the relative bias that the first block owns and all share."""

    def __init__(self, config: ModelConfig, num_layers: int, *, is_decoder: bool) -> None:
        super().__init__()
        self.is_decoder = is_decoder
        self.config = config
        self.block = nn.ModuleList(
            Block(config, is_decoder=is_decoder, has_bias=index == 0) for index in range(num_layers)
        )
        self.final_layer_norm = RMSNorm(config)

    def forward(self, hidden: Tensor, layout: Layout, mask: Tensor, encoded: Encoded | None) -> Tensor:
        hidden = self.drop(hidden)
        bias = self.relative_bias(mask.shape[-1], mask.device) + mask
        for block in self.block:
            hidden = block(hidden, layout, bias, encoded)
        return self.drop(self.final_layer_norm(hidden))

    def relative_bias(self, length: int, device: torch.device) -> Tensor:
        """`[1, heads, length, length]`: the learned bias of each distance bucket."""
        table = self.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        positions = torch.arange(length, device=device)
        buckets = relative_buckets(
            positions[None, :] - positions[:, None],
            bidirectional=not self.is_decoder,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)


class Block(nn.Module):
    """Self-attention, cross-attention (decoder), feed-forward. `layer` numbers them as Hugging Face does."""

    def __init__(self, config: ModelConfig, *, is_decoder: bool, has_bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [AttentionLayer(config, "SelfAttention", has_bias=has_bias)]
        if is_decoder:
            layers.append(AttentionLayer(config, "EncDecAttention", has_bias=False))
        layers.append(FeedForwardLayer(config))
        self.layer = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, layout: Layout, bias: Tensor, encoded: Encoded | None) -> Tensor:
        hidden = self.layer[0](hidden, layout, bias, None)
        if encoded is not None:
            hidden = self.layer[1](hidden, layout, encoded.mask, encoded)
        out: Tensor = self.layer[-1](hidden)
        return out


class AttentionLayer(DropoutModule):
    """Pre-norm attention with its residual. `name` is SelfAttention or EncDecAttention."""

    def __init__(self, config: ModelConfig, name: str, *, has_bias: bool) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, Attention(config, has_bias=has_bias))
        self.layer_norm = RMSNorm(config)

    def forward(self, hidden: Tensor, layout: Layout, bias: Tensor, encoded: Encoded | None) -> Tensor:
        out = getattr(self, self.name)(self.layer_norm(hidden), layout, bias, encoded)
        return hidden + self.drop(out)


class Attention(DropoutModule):
    """Multi-head attention, unscaled (T5 folds the scale into its initial q). Computed in float32 where it matters."""

    def __init__(self, config: ModelConfig, *, has_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.head_size = config.num_heads, config.d_kv
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, hidden: Tensor, layout: Layout, bias: Tensor, encoded: Encoded | None) -> Tensor:
        if encoded is None:
            weight = torch.cat((self.q.weight, self.k.weight, self.v.weight))
            q, k, v = layout.spread(F.linear(hidden, weight)).chunk(3, dim=-1)
        else:
            q = layout.spread(self.q(hidden))
            weight = torch.cat((self.k.weight, self.v.weight))
            k, v = encoded.layout.spread(F.linear(encoded.states, weight)).chunk(2, dim=-1)
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_size).transpose(1, 2) for x in (q, k, v))
        if bias.requires_grad:  # the fused kernels give no gradient to a bias
            scores = q @ k.transpose(-1, -2) + bias
            weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
            out = self.drop(weights) @ v
        else:
            rate = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout_p=rate, scale=1.0)
        joined: Tensor = self.o(layout.take(out.transpose(1, 2).flatten(2)))
        return joined


class FeedForwardLayer(DropoutModule):
    """Pre-norm feed-forward with its residual; gated GELU (T5 1.1) or ReLU (T5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RMSNorm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.DenseReluDense(self.layer_norm(hidden))
        return hidden + self.drop(out)


class FeedForward(DropoutModule):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_gated = config.feed_forward_proj == "gated-gelu"
        if self.is_gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.is_gated:
            inner = F.gelu(self.wi_0(hidden), approximate="tanh") * self.wi_1(hidden)
        else:
            inner = F.relu(self.wi(hidden))
        out: Tensor = self.wo(self.drop(inner))
        return out


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; the mean square in float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight, self.epsilon).to(hidden.dtype)


def segment_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """Additive mask `[rows, 1, queries, keys]`: 0 where the segments are the same, else MASKED.

    >>> segment_mask(torch.tensor([[1, 2]]), torch.tensor([[1, 1, 2]])).tolist()
    [[[[0.0, 0.0, -1000000000.0], [-1000000000.0, -1000000000.0, 0.0]]]]
    """
    apart = queries[:, None, :, None] != keys[:, None, None, :]
    return torch.zeros(apart.shape, device=queries.device).masked_fill(apart, MASKED)


def relative_buckets(distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance `key - query`: one each when near, logarithmic up to `max_distance`, then one.

    >>> relative_buckets(torch.tensor([-3, 0, 3]), bidirectional=True, num_buckets=32, max_distance=128).tolist()
    [3, 0, 19]
    """
    buckets = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        buckets = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + far.long()).clamp(max=num_buckets - 1)
    return buckets + torch.where(distance < exact, distance, far)


@torch.no_grad()
def initialize(model: T5, generator: torch.Generator) -> None:
    """T5's initial weights (T5X): unit embeddings, 1/fan-in matrices, q smaller by the scale that attention lacks."""
    config = model.config
    d_model, inner = config.d_model, config.num_heads * config.d_kv
    spread = {
        "shared": 1.0,
        "lm_head": d_model**-0.5,
        "q": (d_model * config.d_kv) ** -0.5,
        "k": d_model**-0.5,
        "v": d_model**-0.5,
        "o": inner**-0.5,
        "wi": d_model**-0.5,
        "wi_0": d_model**-0.5,
        "wi_1": d_model**-0.5,
        "wo": config.d_ff**-0.5,
        "relative_attention_bias": d_model**-0.5,
    }
    for name, parameter in model.named_parameters():
        owner = name.split(".")[-2]
        if owner in spread:
            parameter.normal_(0.0, spread[owner], generator=generator)
        else:
            parameter.fill_(1.0)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in distinct_parameters(model))


def distinct_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter once (`nn.Module.parameters` already leaves repeats out)."""
    yield from model.parameters()
