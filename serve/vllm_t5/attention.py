"""The decoder's self-attention as a vLLM attention backend: paged, and with T5's relative bias.

vLLM's own backends know ALiBi slopes and windows, but no bias by distance. This one is given to the self-attention
layers alone; cross-attention, which has no bias, stays with the backend that vLLM chooses.

The cache is vLLM's: [blocks, heads, block size, 2 * head size] with keys before values, in any physical layout.
On a GPU everything that depends on the batch is computed on the device into buffers that stay where they are, so a
decode step can be captured as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from serve.vllm_t5.plugin import BACKEND
from serve.vllm_t5.torch_attention import TorchPlan, attend, write_keys_values

TABLE = "relative_bias_table"  # attribute of an Attention layer: [its heads, max_distance + 1] float32


class RelativeBiasBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks about the backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[RelativeBiasImpl]:
        return RelativeBiasImpl

    @staticmethod
    def get_builder_cls() -> type[RelativeBiasMetadataBuilder]:
        return RelativeBiasMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


@dataclass
class RelativeBiasMetadata(AttentionMetadata):  # type: ignore[misc]
    """One step, for all self-attention layers.

    `tokens` rows of the batch, graph padding included. `token_request` and `token_keys` [>= tokens] int32 on the
    device: each row's request and its number of keys, its own included; 0 keys is padding. The two `cpu` tensors are
    there on a CPU only.
    """

    tokens: int
    slots: Tensor
    pages: Tensor
    token_request: Tensor
    token_keys: Tensor
    starts_cpu: Tensor | None
    keys_cpu: Tensor | None
    plan: TorchPlan | None = field(default=None)

    def torch_plan(self, block_size: int, table: Tensor) -> TorchPlan:
        """The plan of a CPU step; the first layer makes it, and T5's layers share one bias table."""
        if self.plan is None or self.plan.table is not table:
            assert self.starts_cpu is not None
            assert self.keys_cpu is not None
            self.plan = TorchPlan.of(self.starts_cpu, self.keys_cpu, self.pages, block_size, table)
        return self.plan


class RelativeBiasMetadataBuilder(AttentionMetadataBuilder[RelativeBiasMetadata]):  # type: ignore[misc]
    """Makes the metadata of a step; no value of a device tensor is read on the host."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
        captured = compilation.max_cudagraph_capture_size
        rows = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, 0 if captured is None else captured)
        self._rows = torch.arange(rows, dtype=torch.int32, device=device)
        self._request = torch.zeros(rows, dtype=torch.int32, device=device)
        self._keys = torch.zeros(rows, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RelativeBiasMetadata:
        common = common_attn_metadata
        tokens, requests = common.num_actual_tokens, common.num_reqs
        keys = common.seq_lens[:requests]
        on_cpu = self.device.type == "cpu"
        if not on_cpu:  # the torch path of a CPU goes by request
            rows_of_tokens(
                self._rows[:tokens],
                common.query_start_loc[: requests + 1],
                keys,
                request=self._request[:tokens],
                keys=self._keys[:tokens],
            )
        return RelativeBiasMetadata(
            tokens=tokens,
            slots=common.slot_mapping,
            pages=common.block_table_tensor[:requests],
            token_request=self._request,
            token_keys=self._keys,
            starts_cpu=common.query_start_loc_cpu[: requests + 1] if on_cpu else None,
            keys_cpu=keys if on_cpu else None,
        )


def rows_of_tokens(rows: Tensor, starts: Tensor, request_keys: Tensor, *, request: Tensor, keys: Tensor) -> None:
    """Write each row's request and number of keys into `request` and `keys`, without a host synchronisation.

    Args:
        rows: [tokens] 0, 1, 2, ...
        starts: [requests + 1] first row of each request and their end; requests of graph padding are empty.
        request_keys: [requests] keys of each request's last row.
    """
    found = torch.searchsorted(starts[1:], rows, right=True).clamp_(max=request_keys.shape[0] - 1)
    behind = starts[found + 1] - 1 - rows  # rows of the same request after this one
    request.copy_(found)
    keys.copy_(torch.where(rows < starts[-1], request_keys[found] - behind, 0))


class RelativeBiasImpl(AttentionImpl[RelativeBiasMetadata]):  # type: ignore[misc]
    """One layer's attention; its bias table hangs on the layer as TABLE once the weights are loaded."""

    def __init__(  # noqa: PLR0913, PLR0917 - vLLM passes these
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if scale != 1.0 or attn_type != AttentionType.DECODER or num_kv_heads not in (None, num_heads):
            raise ValueError("T5's self-attention is causal, not scaled, and has a key head for each query head")
        if kv_cache_dtype not in RelativeBiasBackend.supported_kv_cache_dtypes:
            raise ValueError(f"T5's self-attention keeps its cache in the model's dtype, not in {kv_cache_dtype}")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.kv_cache_dtype = kv_cache_dtype

    def forward(  # noqa: PLR0913, PLR0917 - vLLM passes these
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RelativeBiasMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, key, value, output: [rows, heads, head size]; writes the cache, then `output`."""
        if attn_metadata is None:  # a run that only measures memory
            return output.zero_()
        table = getattr(layer, TABLE)
        rows = attn_metadata.tokens
        if query.is_cuda:
            from serve.vllm_t5 import paged_kernel

            paged_kernel.write_keys_values(key[:rows], value[:rows], kv_cache, attn_metadata.slots)
            paged_kernel.attend(
                query[:rows],
                kv_cache,
                table,
                attn_metadata.pages,
                attn_metadata.token_request,
                attn_metadata.token_keys,
                output[:rows],
            )
            return output
        write_keys_values(key[:rows], value[:rows], kv_cache, attn_metadata.slots)
        attend(query[:rows], kv_cache, attn_metadata.torch_plan(kv_cache.shape[2], table), output[:rows])
        return output
