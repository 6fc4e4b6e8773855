"""The two stacks. The encoder runs as it is; the decoder is what torch.compile and CUDA graphs see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.layernorm import RMSNorm

from serve.vllm_t5.attention import TABLE
from serve.vllm_t5.bias import decoder_table
from serve.vllm_t5.layers import DecoderCrossAttention, DecoderSelfAttention, EncoderSelfAttention, FeedForward
from serve.vllm_t5.model_shape import T5Shape
from serve.vllm_t5.ragged import RaggedAttention


class RelativeBias(nn.Module):
    """The bias of a stack, as in the checkpoint: [buckets, heads] of *all* ranks (it is small)."""

    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.buckets, shape.heads), requires_grad=False)
        self.max_distance = shape.max_distance

    def of_rank(self, heads: int) -> Tensor:
        """[buckets, heads] of this rank."""
        first = get_tensor_model_parallel_rank() * heads
        return self.weight.data[:, first : first + heads]


class EncoderLayer(nn.Module):
    def __init__(self, shape: T5Shape, quantization: Any, prefix: str) -> None:
        super().__init__()
        self.attention = EncoderSelfAttention(shape, quantization, f"{prefix}.attention")
        self.feed_forward = FeedForward(shape, quantization, f"{prefix}.feed_forward")

    def forward(self, hidden: Tensor, attention: RaggedAttention) -> Tensor:
        return self.feed_forward(self.attention(hidden, attention))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """[tokens, d_model] of several texts one after the other -> the same, encoded."""

    def __init__(self, shape: T5Shape, quantization: Any, prefix: str) -> None:
        super().__init__()
        self.relative_bias = RelativeBias(shape)
        layers = [EncoderLayer(shape, quantization, f"{prefix}.layers.{n}") for n in range(shape.encoder_layers)]
        self.layers = nn.ModuleList(layers)
        self.heads = layers[0].attention.heads  # of this rank
        self.norm = RMSNorm(shape.d_model, eps=shape.epsilon)

    def forward(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        weight = self.relative_bias.of_rank(self.heads)
        attention = RaggedAttention(lengths, weight, max_distance=self.relative_bias.max_distance)
        for layer in self.layers:
            hidden = layer(hidden, attention)
        return self.norm(hidden)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    def __init__(self, shape: T5Shape, cache: Any, quantization: Any, prefix: str) -> None:
        super().__init__()
        self.attention = DecoderSelfAttention(shape, cache, quantization, f"{prefix}.attention")
        self.cross_attention = DecoderCrossAttention(shape, cache, quantization, f"{prefix}.cross_attention")
        self.feed_forward = FeedForward(shape, quantization, f"{prefix}.feed_forward")

    def forward(self, hidden: Tensor, encoded: Tensor | None) -> Tensor:
        return self.feed_forward(self.cross_attention(self.attention(hidden), encoded))  # type: ignore[no-any-return]


@support_torch_compile(dynamic_arg_dims={"hidden": 0})
class Decoder(nn.Module):
    """[rows, d_model] of embedded tokens -> [rows, d_model]. Positions are in the attention's metadata."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        shape = T5Shape.from_hf(vllm_config.model_config.hf_config)
        self.relative_bias = RelativeBias(shape)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, vllm_config.cache_config, vllm_config.quant_config, f"{prefix}.layers.{n}")
            for n in range(shape.decoder_layers)
        )
        self.norm = RMSNorm(shape.d_model, eps=shape.epsilon)

    def forward(self, hidden: Tensor, encoded: Tensor | None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, encoded)
        return self.norm(hidden)  # type: ignore[no-any-return]


def hang_bias_tables(decoder: Decoder) -> None:
    """Give every self-attention layer the one table that they share, [heads of this rank, max_distance + 1]."""
    bias = decoder.relative_bias
    attentions = [module for module in decoder.modules() if isinstance(module, DecoderSelfAttention)]
    table = decoder_table(bias.of_rank(attentions[0].heads), max_distance=bias.max_distance)
    for attention in attentions:
        setattr(attention.attn, TABLE, table)
