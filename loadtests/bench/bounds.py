"""What bounds a uniform batch: the time that its arithmetic and its memory would take at this processor's best rates.

No engine with the same arithmetic can be faster. A target beyond the bound of float32 products can only be met with
narrower ones, which are no longer near-exact.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.bench.shapes import Shape

_WEIGHT_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_CACHE_BYTES = 4  # keys and values are float32 in every mode


@dataclass(frozen=True, slots=True)
class Work:
    """What `count` requests of `prompt` tokens in and `output` tokens out cost at least, in operations and bytes."""

    encode_operations: float
    step_operations: float  # of one decode step of all, without the head
    step_weights: float  # numbers that a step reads at least once, without the head
    head_weights: float  # numbers; the head's product is int8 in every mode (serve.engine.shortlist_head)
    cache_bytes: float  # read by attention over all steps
    count: int
    output: int

    @classmethod
    def of(cls, shape: Shape, count: int, prompt: int, output: int) -> Work:
        inner = shape.num_heads * shape.d_kv
        feed_forward = 3 * shape.d_model * shape.d_ff
        encoder = shape.num_layers * (4 * shape.d_model * inner + feed_forward)
        attention = shape.num_layers * 2 * prompt * inner
        cross = shape.num_decoder_layers * 2 * shape.d_model * inner
        decoder = shape.num_decoder_layers * (6 * shape.d_model * inner + feed_forward)
        positions = output * prompt + output * (output + 1) // 2  # keys that all steps of a sequence see
        return cls(
            encode_operations=2.0 * count * prompt * (encoder + attention + cross),
            step_operations=2.0 * count * decoder,
            step_weights=decoder,
            head_weights=shape.vocab_size * shape.d_model,
            cache_bytes=float(count) * shape.num_decoder_layers * 2 * inner * positions * _CACHE_BYTES,
            count=count,
            output=output,
        )

    def seconds(self, mode: str, rates: Mapping[str, float]) -> float:
        """At least so long, with products of `mode`. A step's weights are read or multiplied, whichever is slower."""
        products, memory = rates[mode] * 1e9, rates["memory"] * 1e9
        step = max(self.step_operations / products, self.step_weights * _WEIGHT_BYTES[mode] / memory)
        narrow = rates.get("int8", rates[mode]) * 1e9
        head = max(2.0 * self.count * self.head_weights / narrow, self.head_weights / memory)
        return self.encode_operations / products + self.output * (step + head) + self.cache_bytes / memory


def build(
    rows: Sequence[Mapping[str, Any]], cases: Mapping[tuple[str, str], Work], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A record for every case and mode of ours: the bound in tokens a second, what we reach of it, and where peers are.

    `cases` are the uniform ones, by shape and name. `peers` are multiples of the bound: above 1 is out of its reach.
    """
    records = []
    for (shape, case), work in cases.items():
        speeds: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if (row["shape"], row["workload"], row["case"]) == (shape, "uniform", case):
                title = (row["system"], row["setting"])
                speeds.setdefault(title, []).append(row["metrics"]["tokens_per_second"])
        medians = {title: statistics.median(values) for title, values in speeds.items()}
        for (system, mode), ours in medians.items():
            if system != "ours" or mode not in rates:
                continue
            bound = work.count * work.output / work.seconds(mode, rates)
            peers = {" ".join(title): value / bound for title, value in medians.items() if title[0] != "ours"}
            record = {"shape": shape, "case": case, "mode": mode, "bound": bound, "ours": ours}
            records.append(record | {"reached": ours / bound, "peers": peers})
    return records
