"""T5's arithmetic: the encoder over ragged tokens, the decoder one position a sequence, the decoder teacher-forced.

Shapes: T tokens of all texts one after the other, B sequences (one position each), H heads, D = d_kv per head.
Scores are never divided by sqrt(D), cross-attention has no bias, layer 0's relative bias serves its whole stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.attention import RaggedAttend, RaggedAttention
from serve.engine.cache_tensors import RowShape
from serve.engine.layers import Activation, Linear, RelativeBias, RmsNorm, WeightFormat, make_linear
from serve.engine.native.attention import NativeRaggedAttention
from serve.engine.native.decoder import LayerWeights, NativeDecoder
from serve.engine.native.encoder import EncoderLayerWeights, NativeEncoder
from serve.engine.native.head import NativeShortlistHead
from serve.engine.native.library import Kind, Level, level
from serve.engine.native.linear import NativeLinear
from serve.engine.packed_linear import Float16Linear, fbgemm_available
from serve.engine.sampler import BestTokens, best_and_finite
from serve.engine.shortlist_head import MIN_VOCABULARY, ShortlistHead
from serve.engine.weights import Checkpoint

_FEED_FORWARD_ROWS = 256


class DecodeAttention(Protocol):
    """What the decoder asks of the cache; the runner prepares one a step. Queries are [B, H, D], results [B, H * D]."""

    def self_attention(self, layer: int, q: Tensor, keys_values: Tensor) -> Tensor:
        """Write keys and values [B, 2, H, D] at each sequence's position, then attend over its positions so far."""
        ...

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        """Attend over the encoder states of each sequence's prompt."""
        ...


@dataclass(frozen=True, slots=True)
class _Attention:
    """`qkv` is one matrix [3 * inner, d_model] for self-attention."""

    norm: RmsNorm
    qkv: Linear
    out: Linear


@dataclass(frozen=True, slots=True)
class _CrossAttention:
    """`kv` [2 * inner, d_model] runs once a prompt, `q` every step."""

    norm: RmsNorm
    q: Linear
    kv: Linear
    out: Linear


@dataclass(frozen=True, slots=True)
class _FeedForward:
    """`wi` holds both halves of a gated layer: [2 * d_ff, d_model]."""

    norm: RmsNorm
    wi: Linear
    wo: Linear


@dataclass(frozen=True, slots=True)
class _EncoderLayer:
    attention: _Attention
    feed_forward: _FeedForward


@dataclass(frozen=True, slots=True)
class _DecoderLayer:
    attention: _Attention
    cross: _CrossAttention
    feed_forward: _FeedForward


class T5Model:
    """Weights on their device, and what T5 does with them. Holds no state of any request."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        weights: WeightFormat = "plain",
        vocab_limit: int | None = None,
    ) -> None:
        """`dtype` is that of activations and caches; `weights` other than "plain" are for float32 on a CPU.

        Rows of the head from `vocab_limit` on are dropped: those ids can be neither drawn nor scored.
        """
        config = checkpoint.config
        self.config = config
        self.device = device
        self.dtype = dtype
        self.vocab_limit = config.vocab_size if vocab_limit is None else min(vocab_limit, config.vocab_size)
        native = device.type == "cpu" and dtype is torch.float32 and level() is not Level.NONE
        build = _Builder(checkpoint, device, dtype, weights, native=native)
        self._embedding = build.tensor("shared.weight")
        self._head = _Head(checkpoint.head[: self.vocab_limit], build)
        self._scale = config.d_model**-0.5 if checkpoint.tied and config.scale_decoder_outputs else 1.0
        self._encoder = [build.encoder_layer(block) for block in range(config.num_layers)]
        self._decoder = [build.decoder_layer(block) for block in range(config.num_decoder_layers)]
        self._encoder_norm = build.norm("encoder.final_layer_norm.weight")
        self._decoder_norm = build.norm("decoder.final_layer_norm.weight")
        self.encoder_bias = build.bias("encoder", causal=False)
        self.decoder_bias = build.bias("decoder", causal=True)
        self._activation = Activation(config.activation, gated=config.gated, width=config.d_ff, native=native)
        self._native = native and NativeDecoder.fits(config)
        layers = self._native_layers() if self._native else None
        # Keys and values are stored as the weights are, at least with float16's precision.
        cache_dtype = dtype if layers is None or weights == "plain" else torch.float16
        self.cache_row = RowShape(config.num_decoder_layers, config.num_heads, config.d_kv, cache_dtype)
        self.native_decoder = None if layers is None else self._native_decoder(layers)
        self.native_encoder = self._native_encoder() if self._native else None

    def encode(self, token_ids: Tensor, lengths: SequenceOf[int], attend: RaggedAttend | None = None) -> Tensor:
        """Encoder states [T, d_model] of several prompts' `token_ids` [T], laid one after the other.

        `attend` None is the attention that runs everywhere.
        """
        if attend is None:
            if self.native_encoder is not None:
                return self.native_encoder(token_ids, lengths)
            attend = self._ragged_attention(lengths, causal=False)
        h = F.embedding(token_ids, self._embedding)
        for layer in self._encoder:
            h += self._self_attention(layer.attention, h, attend)
            self._feed_forward(layer.feed_forward, h)
        return self._encoder_norm(h)

    def cross_keys_values(self, states: Tensor) -> Iterator[Tensor]:
        """Per decoder layer the keys and values of encoder states [T, d_model]: [T, 2, H, D]."""
        for layer in self._decoder:
            yield layer.cross.kv(states).view(-1, 2, self.config.num_heads, self.config.d_kv)

    def decode(self, token_ids: Tensor, attention: DecodeAttention) -> Tensor:
        """One decoder position of each sequence: input ids [B] -> states [B, d_model]."""
        heads, d_kv = self.config.num_heads, self.config.d_kv
        h = F.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._decoder):
            qkv = layer.attention.qkv(layer.attention.norm(h)).view(-1, 3, heads, d_kv)
            h += layer.attention.out(attention.self_attention(index, qkv[:, 0], qkv[:, 1:]))
            q = layer.cross.q(layer.cross.norm(h)).view(-1, heads, d_kv)
            h += layer.cross.out(attention.cross_attention(index, q))
            self._feed_forward(layer.feed_forward, h)
        return self._decoder_norm(h)

    def decode_forced(
        self, token_ids: Tensor, lengths: SequenceOf[int], cross: SequenceOf[Tensor], attend: RaggedAttend | None = None
    ) -> Tensor:
        """Decoder states [T, d_model] of whole given texts that share one prompt.

        `token_ids` [T]: each text's decoder input (start token first). `cross[layer]`: the prompt's keys and values
        [2, H, prompt length, D]. `attend` None is the attention that runs everywhere.
        """
        if attend is None:
            attend = self._ragged_attention(lengths, causal=True)
        heads, d_kv = self.config.num_heads, self.config.d_kv
        h = F.embedding(token_ids, self._embedding)
        for layer, keys_values in zip(self._decoder, cross, strict=True):
            h += self._self_attention(layer.attention, h, attend)
            q = layer.cross.q(layer.cross.norm(h)).view(-1, heads, d_kv).transpose(0, 1)
            key, value = keys_values.to(q.dtype)
            attended = F.scaled_dot_product_attention(q[None], key[None], value[None], scale=1.0)
            h += layer.cross.out(attended[0].transpose(0, 1).flatten(1))
            self._feed_forward(layer.feed_forward, h)
        return self._decoder_norm(h)

    def logits(self, states: Tensor, best_only: SequenceOf[bool] = ()) -> Tensor:
        """Decoder states [B, d_model] -> float32 logits [B, vocab_limit].

        `best_only` marks rows that nobody asks for more than their largest logit: these may be -inf everywhere else.
        None given: none is.
        """
        return self._head(self._scaled(states), best_only)

    def best_tokens(self, states: Tensor) -> BestTokens | None:
        """The token of each state's largest logit; None where that takes all logits anyway."""
        return self._head.best_tokens(self._scaled(states))

    def _scaled(self, states: Tensor) -> Tensor:
        return states if self._scale == 1.0 else states * self._scale

    def _ragged_attention(self, lengths: SequenceOf[int], *, causal: bool) -> RaggedAttend:
        bias = self.decoder_bias if causal else self.encoder_bias
        if self._native:
            return NativeRaggedAttention(lengths, bias.line(max(lengths)))
        return RaggedAttention(lengths, bias, causal=causal, device=self.device)

    def _self_attention(self, layer: _Attention, h: Tensor, attend: RaggedAttend) -> Tensor:
        x = layer.norm(h)
        q, k, v = layer.qkv(x).view(-1, 3, self.config.num_heads, self.config.d_kv).unbind(1)
        return layer.out(attend(q, k, v).flatten(1))

    def _feed_forward(self, layer: _FeedForward, h: Tensor) -> None:
        """h += the layer's feed-forward of it.

        In pieces, where a row's result does not depend on them: its inner activations are the largest tensor of all,
        and fresh memory for thousands of rows takes the system as long to give as the products take.
        """
        for part in torch.split(h, _FEED_FORWARD_ROWS) if self._native else (h,):
            part += layer.wo(self._activation(layer.wi(layer.norm(part))))

    def _native_encoder(self) -> NativeEncoder | None:
        """The encoder for our own kernels; None where some layers are not theirs."""
        layers: list[EncoderLayerWeights] = []
        for layer in self._encoder:
            own, feed = layer.attention, layer.feed_forward
            native = _all_native(own.qkv, own.out, feed.wi, feed.wo)
            if native is None:
                return None
            layers.append(EncoderLayerWeights((own.norm.weight, feed.norm.weight), native))
        cross = _all_native(*(layer.cross.kv for layer in self._decoder))
        if cross is None:
            return None
        return NativeEncoder(
            self.config,
            layers,
            list(cross),
            embedding=self._embedding,
            bias=self.encoder_bias,
            final_norm=self._encoder_norm.weight,
            cache_dtype=self.cache_row.dtype,
        )

    def _native_layers(self) -> list[LayerWeights] | None:
        """The decoder's layers for our own kernels; None where some are not theirs (int8 without VNNI)."""
        layers: list[LayerWeights] = []
        for layer in self._decoder:
            own, cross, feed = layer.attention, layer.cross, layer.feed_forward
            native = _all_native(own.qkv, own.out, cross.q, cross.out, feed.wi, feed.wo)
            if native is None:
                return None
            layers.append(LayerWeights((own.norm.weight, cross.norm.weight, feed.norm.weight), native))
        return layers

    def _native_decoder(self, layers: list[LayerWeights]) -> NativeDecoder:
        return NativeDecoder(
            self.config,
            layers,
            embedding=self._embedding,
            bias=self.decoder_bias.before(),
            final_norm=self._decoder_norm.weight,
            cache_dtype=self.cache_row.dtype,
        )


def _all_native(*linears: Linear) -> tuple[NativeLinear, ...] | None:
    """The same, if all of them are for our own kernels."""
    native = tuple(linear for linear in linears if isinstance(linear, NativeLinear))
    return native if len(native) == len(linears) else None


class _Head:
    """The head: the full product, and a shortlist where that is faster."""

    def __init__(self, weight: Tensor, build: _Builder) -> None:
        """`weight` is [vocabulary, d_model] in any floating dtype."""
        self._vocabulary = weight.shape[0]
        self._full = build.head(weight)
        self._shortlist = build.shortlist(weight)

    def __call__(self, states: Tensor, best_only: SequenceOf[bool]) -> Tensor:
        """[B, d_model] -> float32 [B, vocabulary]; see T5Model.logits."""
        if self._shortlist is None or not any(best_only):
            return self._full(states).float()
        at = torch.tensor(best_only)
        found = self._shortlist(states[at])
        at[at.clone()] = ~found.crowded
        logits = states.new_full((states.shape[0], self._vocabulary), -math.inf)
        sure = ~found.crowded
        logits[at, found.token_ids[sure]] = found.logits[sure]
        logits[~at] = self._full(states[~at])
        return logits

    def best_tokens(self, states: Tensor) -> BestTokens | None:
        """See T5Model.best_tokens."""
        if self._shortlist is None:
            return None
        found = self._shortlist(states)
        finite = torch.ones_like(found.crowded)
        if bool(found.crowded.any()):
            rest = found.crowded.nonzero().squeeze(1)
            found.token_ids[rest], flags = best_and_finite(self._full(states[rest]))
            finite[rest] = flags.bool()
        return BestTokens(found.token_ids, finite)


class _Builder:
    """Takes layers out of a checkpoint, fused and on their device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        weights: WeightFormat,
        *,
        native: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._weights: WeightFormat = weights
        self._native = native

    def head(self, weight: Tensor) -> Linear:
        """The full product. int8 is not for it: a head in float16 costs a greedy step nothing."""
        weights: WeightFormat = "plain" if self._weights == "plain" else "float16"
        return make_linear(
            weight, device=self._device, dtype=self._dtype, weights=weights, few_rows=True, native=self._native
        )

    def shortlist(self, weight: Tensor) -> ShortlistHead | NativeShortlistHead | None:
        """None where there is no gain or no kernel for it."""
        on_cpu = self._device.type == "cpu" and self._dtype is torch.float32 and fbgemm_available()
        if not on_cpu or weight.shape[0] < MIN_VOCABULARY:
            return None
        half = self._weights != "plain" and Float16Linear.fits(weight)
        weight = weight.to(torch.float16 if half else torch.float32)
        if self._native and NativeLinear.fits(weight, Kind.INT8):
            return NativeShortlistHead(weight)
        return ShortlistHead(weight)

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.tensor(name), self._checkpoint.config.layer_norm_epsilon, native=self._native)

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint[name].to(device=self._device, dtype=self._dtype)

    def linear(self, *names: str, delicate: bool = False) -> Linear:
        """One linear layer of the named matrices, outputs one after the other."""
        weight = torch.cat([self._checkpoint[f"{name}.weight"] for name in names])
        # What runs over a prompt's tokens: the encoder, and the keys and values of cross-attention.
        many_rows = names[0].startswith("encoder.") or names[0].endswith("EncDecAttention.k")
        return make_linear(
            weight,
            device=self._device,
            dtype=self._dtype,
            weights=self._weights,
            few_rows=not many_rows,
            delicate=delicate,
            native=self._native,
        )

    def bias(self, stack: str, *, causal: bool) -> RelativeBias:
        return RelativeBias(
            self._checkpoint[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
            max_distance=self._checkpoint.config.relative_attention_max_distance,
            causal=causal,
            device=self._device,
            dtype=self._dtype,
        )

    def encoder_layer(self, block: int) -> _EncoderLayer:
        prefix = f"encoder.block.{block}.layer"
        return _EncoderLayer(self._attention(f"{prefix}.0"), self._feed_forward(f"{prefix}.1"))

    def decoder_layer(self, block: int) -> _DecoderLayer:
        prefix = f"decoder.block.{block}.layer"
        cross = f"{prefix}.1.EncDecAttention"
        return _DecoderLayer(
            self._attention(f"{prefix}.0"),
            _CrossAttention(
                norm=self.norm(f"{prefix}.1.layer_norm.weight"),
                q=self.linear(f"{cross}.q"),
                kv=self.linear(f"{cross}.k", f"{cross}.v"),
                out=self.linear(f"{cross}.o"),
            ),
            self._feed_forward(f"{prefix}.2"),
        )

    def _attention(self, prefix: str) -> _Attention:
        names = [f"{prefix}.SelfAttention.{name}" for name in "qkv"]
        return _Attention(
            norm=self.norm(f"{prefix}.layer_norm.weight"),
            qkv=self.linear(*names),
            out=self.linear(f"{prefix}.SelfAttention.o"),
        )

    def _feed_forward(self, prefix: str) -> _FeedForward:
        inputs = ("wi_0", "wi_1") if self._checkpoint.config.gated else ("wi",)
        return _FeedForward(
            norm=self.norm(f"{prefix}.layer_norm.weight"),
            wi=self.linear(*(f"{prefix}.DenseReluDense.{name}" for name in inputs)),
            wo=self.linear(f"{prefix}.DenseReluDense.wo", delicate=True),
        )
