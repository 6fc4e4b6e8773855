"""A decode step of static shape: inputs at fixed addresses, one CUDA graph a batch bucket, rows of padding.

A step is one small copy to the device, one replay, and the one transfer back that brings the ids. Without CUDA the
same step runs eagerly (through Triton's interpreter, for tests).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.engine import sampler
from serve.engine.gpu import decode_kernels
from serve.engine.gpu.decode_kernels import CachedKeys
from serve.engine.gpu.paged_cache import PagedCache
from serve.engine.model import T5Model
from serve.engine.sequence import Sequence

_PROCESSORS_WITHOUT_CUDA = 1  # no splits


def buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that have their own graph: 1, 2, 4, ... and `max_rows` itself."""
    return (*(1 << power for power in range((max_rows - 1).bit_length())), max_rows)


class StepInputs:
    """What a step reads, int32 on the device: one column a row of the batch, filled in one copy.

    A column of zeros is a row of padding: it puts the start of nothing into page 0, which is nobody's, and its prompt
    has no tokens.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._staged = torch.zeros((5, max_rows), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._columns = self._staged.numpy()
        self._device = torch.zeros((5, max_rows), dtype=torch.int32, device=device)
        self.token_ids, self.positions, self.self_first, self.prompt_lengths, self.cross_first = self._device

    def fill(self, sequences: SequenceOf[Sequence], cache: PagedCache, *, start_token_id: int) -> None:
        """Put `sequences` into the first columns, zeros into the others.

        The staging memory may be written again because the ids of the step before have been waited for.
        """
        rows = [
            (
                s.token_ids[s.position - 1] if s.position > 0 else start_token_id,
                s.position,
                cache.first("self", s),
                len(s.prompt_ids),
                cache.first("cross", s.prompt),
            )
            for s in sequences
        ]
        self._columns[:, : len(rows)] = np.array(rows, dtype=np.int32).T
        self._columns[:, len(rows) :] = 0
        self._device.copy_(self._staged, non_blocking=True)

    def clear(self) -> None:
        """All rows are padding."""
        self._device.zero_()


class PagedAttention:
    """Implements model.DecodeAttention for all steps of one bucket; results are [rows, heads * d_kv]."""

    def __init__(self, cache: PagedCache, inputs: StepInputs, table: Tensor, *, rows: int, processors: int) -> None:
        """`table` [heads, max_distance + 1] float32 is the decoder's bias by distance."""
        self._arena = cache.arena
        self._table = table
        self._self_keys = CachedKeys(cache.page_numbers, inputs.self_first[:rows], inputs.positions[:rows])
        self._cross_keys = CachedKeys(cache.page_numbers, inputs.cross_first[:rows], inputs.prompt_lengths[:rows])
        self._splits = decode_kernels.splits_for(rows, table.shape[0], processors)

    def self_attention(self, layer: int, q: Tensor, keys_values: Tensor) -> Tensor:
        out = decode_kernels.self_attention(
            q, keys_values, self._arena[layer], self._table, self._self_keys, splits=self._splits
        )
        return out.flatten(1)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        out = decode_kernels.cross_attention(q, self._arena[layer], self._cross_keys, splits=self._splits)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """`decode` gives logits [rows, vocabulary] at one address; `choose` reads them there: [2, rows] ids and flags."""

    decode: Callable[[], Tensor]
    choose: Callable[[Tensor], Tensor]


class DecodeSteps:
    """Decode steps of up to `max_rows` sequences of a model over its cache."""

    def __init__(
        self, model: T5Model, cache: PagedCache, *, max_rows: int, max_distance: int, processors: int | None = None
    ) -> None:
        """On CUDA every bucket's graph is captured here, so that no request waits for it: seconds, not milliseconds.

        `processors` (default: the device's) sets how many programs share a row's keys.
        """
        self._model = model
        self._cache = cache
        self._cuda = model.device.type == "cuda"
        if processors is None:
            processors = (
                torch.cuda.get_device_properties(model.device).multi_processor_count
                if self._cuda
                else _PROCESSORS_WITHOUT_CUDA
            )
        self._processors = processors
        distances = torch.arange(max_distance + 1, device=model.device)
        self._table = model.decoder_bias.at(-distances).float().contiguous()
        self._inputs = StepInputs(max_rows, model.device)
        self._sizes = buckets(max_rows)
        self._buckets: dict[int, _Bucket] = {}
        if self._cuda:
            self._pool = torch.cuda.graph_pool_handle()
            with torch.inference_mode():
                for rows in reversed(self._sizes):  # the largest first: the others fit into its memory
                    self._buckets[rows] = self._capture(rows)
        else:
            self._buckets = {rows: _Bucket(self._eager(rows), sampler.best_and_finite) for rows in self._sizes}

    def decode(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """Logits [sequences, vocabulary] float32, valid until the next step of the same bucket."""
        self._inputs.fill(sequences, self._cache, start_token_id=self._model.config.decoder_start_token_id)
        return self._bucket(len(sequences)).decode()[: len(sequences)]

    def choose(self, logits: Tensor) -> Tensor:
        """[2, rows] int64: best ids and whether each row is finite, of the last step's `logits`, as they are now."""
        return self._bucket(len(logits)).choose(logits)[:, : len(logits)]

    def _bucket(self, count: int) -> _Bucket:
        return self._buckets[next(size for size in self._sizes if size >= count)]

    def _eager(self, rows: int) -> Callable[[], Tensor]:
        attention = PagedAttention(self._cache, self._inputs, self._table, rows=rows, processors=self._processors)
        token_ids = self._inputs.token_ids[:rows]
        return lambda: self._model.logits(self._model.decode(token_ids, attention))

    def _capture(self, rows: int) -> _Bucket:
        """Record a step of `rows` rows, and the choice of its ids, as two graphs."""
        run = self._eager(rows)
        self._inputs.clear()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels and settles what libraries do once
            sampler.best_and_finite(run())
        torch.cuda.current_stream().wait_stream(stream)
        decode_graph, choose_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Only this thread's calls are recorded, or forbidden.
        with torch.cuda.graph(decode_graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = run()
        with torch.cuda.graph(choose_graph, pool=self._pool, capture_error_mode="thread_local"):
            chosen = sampler.best_and_finite(logits)

        def decode() -> Tensor:
            decode_graph.replay()
            return logits

        def choose(given: Tensor) -> Tensor:
            if given.data_ptr() != logits.data_ptr():
                return sampler.best_and_finite(given)
            choose_graph.replay()
            return chosen

        return _Bucket(decode, choose)
