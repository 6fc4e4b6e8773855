"""The decode step of a T5, in one call to the native kernels.

It reads and writes the cache's rows where they lie, each sequence to its own length: nothing is padded, gathered or
masked, and the order of the batch does not matter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.cache import MIN_CAPACITY
from serve.engine.cache_tensors import CacheTensors
from serve.engine.config import ModelConfig
from serve.engine.native.library import ACTIVATIONS, LayerTable, Level, ModelTable, ScratchTable, address, level, loaded
from serve.engine.native.linear import BLOCK, NativeLinear, room_for_quantized, whole_blocks
from serve.engine.row_tensors import RowTensors
from serve.engine.sequence import Sequence

_LANES, _MAX_D_KV = 16, 256
_LEAST_SCORES = 512  # positions that there is room for from the start


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer: its norms' weights and its linear layers, in types.h's order."""

    norms: tuple[Tensor, Tensor, Tensor]  # of self-attention, cross-attention, feed-forward: [d_model] float32
    linears: tuple[NativeLinear, ...]  # qkv, out; q and out of cross-attention; wi with both halves of a gated one, wo


class NativeDecoder:
    """The decoder's weights by their addresses, and the room for a step."""

    def __init__(
        self,
        config: ModelConfig,
        layers: list[LayerWeights],
        *,
        embedding: Tensor,
        bias: Tensor,
        final_norm: Tensor,
        cache_dtype: torch.dtype,
    ) -> None:
        """`bias` [heads, max_distance + 1]: of a key max_distance, ... 1, 0 positions behind the query. All float32.

        `cache_dtype` is that of the rows: float32, or float16.
        """
        self._config = config
        self.bias = bias.contiguous()
        self._kept = (layers, embedding, final_norm)  # what the tables point to, too
        self._tables = (LayerTable * len(layers))(
            *(
                LayerTable(
                    *(address(norm) for norm in layer.norms),
                    *(linear.table for linear in layer.linears),
                )
                for layer in layers
            )
        )
        self._model = ModelTable(
            len(layers),
            config.num_heads,
            config.d_kv,
            config.d_model,
            ACTIVATIONS[config.activation],
            config.gated,
            bias.shape[1] - 1,
            cache_dtype is torch.float16,
            config.layer_norm_epsilon,
            address(embedding),
            address(self.bias),
            address(final_norm),
            ctypes.cast(self._tables, ctypes.POINTER(LayerTable)),
        )
        self._scratch = ScratchTable()
        self._room: tuple[Tensor, ...] = ()
        self._fits = (0, 0, 0)  # rows, positions and threads that there is room for

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        """Whether there are kernels for a model of these dimensions."""
        whole = all(width % _LANES == 0 for width in (config.d_model, config.d_kv, config.inner))
        known = config.activation in ACTIVATIONS and config.d_ff % BLOCK == 0 and config.d_kv <= _MAX_D_KV
        return level() is not Level.NONE and whole and known

    def step(self, sequences: SequenceOf[Sequence], cache: CacheTensors[RowTensors]) -> Tensor:
        """One position of each sequence: states [batch, d_model], normalized. Writes its keys and values."""
        rows, longest = self._rows(sequences, cache)
        return self._run(rows, len(sequences), longest)

    def try_step(self, batch: int) -> Tensor:
        """A step of `batch` sequences that hold nothing yet, to see what it takes: as `step`."""
        config = self._config
        head = MIN_CAPACITY * config.d_kv
        steps = (head * config.num_heads * 2, head * config.num_heads, head)
        nowhere = torch.zeros(len(self._tables) * steps[0])
        row = (config.decoder_start_token_id, *(address(nowhere), *steps, 1) * 2)
        return self._run(torch.tensor(row * batch, dtype=torch.int64), batch, 1)

    def _run(self, rows: Tensor, batch: int, longest: int) -> Tensor:
        threads = torch.get_num_threads()
        self._make_room(batch, longest, threads)
        out = torch.empty(batch, self._config.d_model)
        loaded().flan_step(
            level(), threads, ctypes.byref(self._model), rows.data_ptr(), batch, ctypes.byref(self._scratch),
            out.data_ptr(),
        )  # fmt: skip
        return out

    def _rows(self, sequences: SequenceOf[Sequence], cache: CacheTensors[RowTensors]) -> tuple[Tensor, int]:
        """types.h's Row of each sequence [batch, 11] int64, and the longest attention."""
        addresses, cross_addresses = cache.self_rows.addresses, cache.cross_rows.addresses
        steps = {capacity: cache.self_rows.steps(capacity) for capacity in {*addresses, *cross_addresses}}
        numbers: list[int] = []
        longest = 0
        start = self._config.decoder_start_token_id
        for sequence in sequences:
            own, prompt = sequence.slot, sequence.prompt
            if own is None or prompt is None or prompt.slot is None:
                raise ValueError("only holders of a row can be in a batch")
            position, length = sequence.position, len(prompt.token_ids)
            longest = max(longest, position + 1, length)
            token = sequence.token_ids[position - 1] if position > 0 else start
            numbers += (token, addresses[own.capacity][own.row], *steps[own.capacity], position + 1)
            slot = prompt.slot
            numbers += (cross_addresses[slot.capacity][slot.row], *steps[slot.capacity], length)
        return torch.tensor(numbers, dtype=torch.int64), longest

    def _make_room(self, rows: int, longest: int, threads: int) -> None:
        if rows <= self._fits[0] and longest <= self._fits[1] and threads <= self._fits[2]:
            return
        config = self._config
        rows, longest = max(rows, self._fits[0]), max(longest, self._fits[1], _LEAST_SCORES)
        threads = max(threads, self._fits[2])
        h_step, x_step = whole_blocks(config.d_model), whole_blocks(max(config.d_model, config.inner))
        y_step = max(whole_blocks(3 * config.inner), whole_blocks(config.d_ff) * (2 if config.gated else 1))
        scores_step = whole_blocks(longest)
        floats = torch.zeros(rows * (h_step + x_step + y_step) + threads * scores_step)
        start = address(floats)
        x = start + 4 * rows * h_step
        y = x + 4 * rows * x_step
        scores = y + 4 * rows * y_step
        table, room = room_for_quantized(rows, max(config.d_model, config.inner, config.d_ff))
        self._scratch = ScratchTable(start, x, y, scores, h_step, x_step, y_step, scores_step, 0, 0, table)
        self._room = (floats, room)
        self._fits = (rows, longest, threads)
