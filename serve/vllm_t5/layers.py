"""T5's blocks out of vLLM's parallel layers. No layer has a bias vector, and no attention scales its scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.activation import get_act_and_mul_fn, get_act_fn
from vllm.model_executor.layers.attention import Attention, CrossAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from serve.vllm_t5.attention import RelativeBiasBackend
from serve.vllm_t5.model_shape import T5Shape
from serve.vllm_t5.ragged import RaggedAttention

# transformers' name of an activation -> vLLM's; "gelu_new" is the tanh approximation.
GATED = {"gelu_new": "gelu_pytorch_tanh", "gelu": "gelu", "silu": "silu"}
UNGATED = {"gelu_new": "gelu_new", "gelu": "gelu", "silu": "silu", "relu": "relu"}


class FeedForward(nn.Module):
    """[tokens, d_model] -> [tokens, d_model], its norm included; gated (T5 1.1) or not (T5)."""

    def __init__(self, shape: T5Shape, quantization: Any, prefix: str) -> None:
        super().__init__()
        names = GATED if shape.gated else UNGATED
        if shape.activation not in names:
            raise ValueError(f"{'gated ' if shape.gated else ''}{shape.activation} is no activation of a known T5")
        self.norm = RMSNorm(shape.d_model, eps=shape.epsilon)
        if shape.gated:
            self.wi = MergedColumnParallelLinear(
                shape.d_model, [shape.d_ff] * 2, bias=False, quant_config=quantization, prefix=f"{prefix}.wi"
            )
            self.activation = get_act_and_mul_fn(names[shape.activation])
        else:
            self.wi = ColumnParallelLinear(
                shape.d_model, shape.d_ff, bias=False, quant_config=quantization, prefix=f"{prefix}.wi"
            )
            self.activation = get_act_fn(names[shape.activation])
        self.wo = RowParallelLinear(
            shape.d_ff, shape.d_model, bias=False, quant_config=quantization, prefix=f"{prefix}.wo"
        )

    def forward(self, hidden: Tensor) -> Tensor:
        inner, _ = self.wi(self.norm(hidden))
        out, _ = self.wo(self.activation(inner))
        return hidden + out  # type: ignore[no-any-return]


class _SelfAttention(nn.Module):
    """Norm and projections that both stacks share."""

    def __init__(self, shape: T5Shape, quantization: Any, prefix: str) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.d_model, eps=shape.epsilon)
        self.qkv = QKVParallelLinear(
            shape.d_model, shape.d_kv, shape.heads, bias=False, quant_config=quantization, prefix=f"{prefix}.qkv"
        )
        self.o = RowParallelLinear(
            shape.heads * shape.d_kv, shape.d_model, bias=False, quant_config=quantization, prefix=f"{prefix}.o"
        )
        self.heads = self.qkv.num_heads  # of this rank
        self.d_kv = shape.d_kv


class EncoderSelfAttention(_SelfAttention):
    """Over texts that stand one after the other: [tokens, d_model] -> [tokens, d_model]."""

    def forward(self, hidden: Tensor, attention: RaggedAttention) -> Tensor:
        qkv, _ = self.qkv(self.norm(hidden))
        query, key, value = (x.unflatten(-1, (self.heads, self.d_kv)) for x in qkv.chunk(3, dim=-1))
        out, _ = self.o(attention(query, key, value).flatten(1))
        return hidden + out  # type: ignore[no-any-return]


class DecoderSelfAttention(_SelfAttention):
    """Over vLLM's paged cache, with the bias of RelativeBiasBackend."""

    def __init__(self, shape: T5Shape, cache: Any, quantization: Any, prefix: str) -> None:
        super().__init__(shape, quantization, prefix)
        self.attn = Attention(
            self.heads,
            shape.d_kv,
            scale=1.0,
            cache_config=cache,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
            attn_backend=RelativeBiasBackend,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        qkv, _ = self.qkv(self.norm(hidden))
        query, key, value = qkv.chunk(3, dim=-1)
        out, _ = self.o(self.attn(query, key, value))
        return hidden + out  # type: ignore[no-any-return]


class DecoderCrossAttention(nn.Module):
    """Over the encoder's output, whose keys and values vLLM keeps from a request's first step on."""

    def __init__(self, shape: T5Shape, cache: Any, quantization: Any, prefix: str) -> None:
        super().__init__()
        inner = shape.heads * shape.d_kv
        self.norm = RMSNorm(shape.d_model, eps=shape.epsilon)
        self.q = ColumnParallelLinear(shape.d_model, inner, bias=False, quant_config=quantization, prefix=f"{prefix}.q")
        self.kv = MergedColumnParallelLinear(
            shape.d_model, [inner] * 2, bias=False, quant_config=quantization, prefix=f"{prefix}.kv"
        )
        self.o = RowParallelLinear(inner, shape.d_model, bias=False, quant_config=quantization, prefix=f"{prefix}.o")
        self.attn = CrossAttention(
            self.q.output_size_per_partition // shape.d_kv,
            shape.d_kv,
            scale=1.0,
            cache_config=cache,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden: Tensor, encoded: Tensor | None) -> Tensor:
        """`encoded` [tokens of all new requests, d_model] in the order of their rows; None where none is new."""
        query, _ = self.q(self.norm(hidden))
        key = value = None
        if encoded is not None:
            both, _ = self.kv(encoded)
            key, value = both.chunk(2, dim=-1)
        out, _ = self.o(self.attn(query, key, value))
        return hidden + out  # type: ignore[no-any-return]
