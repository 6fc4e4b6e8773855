"""How many threads a decode step runs on: all of them, or one.

A step of few rows is a chain of some hundred small operations. Waking a second thread for each may cost more than it
saves: by a third for one row of flan-t5-small on two cores. Where it begins to pay depends on model, format and
processor, so it is tried when the model is loaded, and not looked at again: equal batches are computed equally.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from serve.engine.model import T5Model

_ROWS = (1, 2, 4, 8, 16, 32)  # batches that are tried; larger ones take all threads
_TRIES = 4
_SLOW_SECONDS = 0.1  # a step that takes so long on one thread is no matter of waking threads
_GAIN = 1.05  # all threads have to be so many times as fast


class ThreadChoice:
    """Made once a model; `with choice(rows):` around a step."""

    def __init__(self, seconds: Callable[[int, int], float], *, worth_seconds: float = 0.0) -> None:
        """`seconds(rows, threads)` is what a step of so many rows takes on so many threads; `worth_seconds` is what all
        threads have to save at least.
        """
        self._threads = torch.get_num_threads()
        self._most_rows_alone = 0
        if self._threads == 1:
            return
        for rows in _ROWS:
            alone = seconds(rows, 1)
            if alone > _SLOW_SECONDS or alone > _GAIN * seconds(rows, self._threads) + worth_seconds:
                break
            self._most_rows_alone = rows

    @classmethod
    def of(cls, model: T5Model, *, worth_seconds: float = 0.0) -> ThreadChoice:
        """By trying the decoder's layers, without a cache."""
        heads, d_kv = model.config.num_heads, model.config.d_kv

        class NoCache:
            def self_attention(self, layer: int, q: Tensor, keys_values: Tensor) -> Tensor:
                return q.flatten(1)

            def cross_attention(self, layer: int, q: Tensor) -> Tensor:
                return q.reshape(-1, heads * d_kv)

        def seconds(rows: int, threads: int) -> float:
            ids = torch.full((rows,), model.config.decoder_start_token_id)
            least = float("inf")
            with torch.inference_mode(), _on(threads):
                for _ in range(_TRIES):
                    began = time.perf_counter()
                    native = model.native_decoder
                    states = model.decode(ids, NoCache()) if native is None else native.try_step(rows)
                    if model.best_tokens(states) is None:
                        model.logits(states)
                    least = min(least, time.perf_counter() - began)
                    if least > _SLOW_SECONDS:
                        break
            return least

        return cls(seconds, worth_seconds=worth_seconds)

    @contextmanager
    def __call__(self, rows: int) -> Iterator[None]:
        """Around a step of so many rows."""
        if rows > self._most_rows_alone:
            yield
        else:
            with _on(1):
                yield


@contextmanager
def _on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
