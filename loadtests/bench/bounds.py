"""What bounds requests that are all there at once: the time of their arithmetic and memory at the best rates here.

No engine with the same arithmetic can be faster. A target beyond the bound of float32 products can only be met with
narrower ones, which are no longer near-exact.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.bench.shapes import Shape

_WEIGHT_BYTES = {"float32": 4, "float16": 2, "int16": 2, "int8": 1}
_CACHE_BYTES = {"float32": 4, "float16": 2, "int16": 2, "int8": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """What requests cost at least, in operations, and in numbers that are read."""

    encode_operations: float  # of products with weights, up to the keys and values for the decoder
    attention_operations: float  # of the encoder
    decode_operations: float  # of all steps, without the head
    step_weights: float  # numbers that a step reads at least once, without the head
    head_weights: float  # numbers; the head's product is int8 in every mode (serve.engine.shortlist_head)
    cache_numbers: float  # read by attention over all steps
    steps: float  # at least so many
    tokens: int  # that come out

    @classmethod
    def of(cls, shape: Shape, requests: Sequence[tuple[int, int]], at_once: int) -> Work:
        """`requests` are tokens in and tokens out of each; `at_once` of them run at most."""
        inner = shape.num_heads * shape.d_kv
        feed_forward = 3 * shape.d_model * shape.d_ff
        encoder = shape.num_layers * (4 * shape.d_model * inner + feed_forward)
        cross = shape.num_decoder_layers * 2 * shape.d_model * inner
        decoder = shape.num_decoder_layers * (6 * shape.d_model * inner + feed_forward)
        tokens = sum(output for _, output in requests)
        return cls(
            encode_operations=sum(2.0 * prompt * (encoder + cross) for prompt, _ in requests),
            attention_operations=sum(2.0 * prompt * shape.num_layers * 2 * prompt * inner for prompt, _ in requests),
            decode_operations=2.0 * tokens * decoder,
            step_weights=decoder,
            head_weights=shape.vocab_size * shape.d_model,
            cache_numbers=shape.num_decoder_layers
            * 2.0
            * inner
            * sum(output * prompt + output * (output + 1) // 2 for prompt, output in requests),
            steps=max(tokens / at_once, *(output for _, output in requests)),
            tokens=tokens,
        )

    def least(self, mode: str, rates: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each part at least, with products of `mode`; attention is float32's in all of them.

        A step's weights are read or multiplied, whichever is slower.
        """
        products, memory = rates[mode] * 1e9, rates["memory"] * 1e9
        layers = max(self.decode_operations / products, self.steps * self.step_weights * _WEIGHT_BYTES[mode] / memory)
        narrow = rates.get("int8", rates[mode]) * 1e9
        head = max(2.0 * self.tokens * self.head_weights / narrow, self.steps * self.head_weights / memory)
        return {
            "encoder products": self.encode_operations / products,
            "encoder attention": self.attention_operations / (rates["float32"] * 1e9),
            "decoder products": layers,
            "decoder attention": self.cache_numbers * _CACHE_BYTES[mode] / memory,
            "head products": head,
        }

    def seconds(self, mode: str, rates: Mapping[str, float]) -> float:
        """At least so long, all in all."""
        return sum(self.least(mode, rates).values())


def build(
    rows: Sequence[Mapping[str, Any]], cases: Mapping[tuple[str, str, str], Work], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A record for every case and mode of ours: the bound in tokens a second, what we reach of it, and where peers are.

    `cases` are by shape, workload and name. `peers` are multiples of the bound: above 1 is out of its reach.
    """
    records = []
    for (shape, workload, case), work in cases.items():
        speeds: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if (row["shape"], row["workload"], row["case"]) == (shape, workload, case):
                title = (row["system"], row["setting"])
                speeds.setdefault(title, []).append(row["metrics"]["tokens_per_second"])
        medians = {title: statistics.median(values) for title, values in speeds.items()}
        for (system, mode), ours in medians.items():
            if system != "ours" or mode not in rates:
                continue
            bound = work.tokens / work.seconds(mode, rates)
            peers = {" ".join(title): value / bound for title, value in medians.items() if title[0] != "ours"}
            record = {"shape": shape, "case": case, "mode": mode, "bound": bound, "ours": ours}
            records.append(record | {"reached": ours / bound, "peers": peers})
    return records
