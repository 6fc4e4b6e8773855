"""Flan-T5-XL's shapes on a card: 128 new tokens for whole batches, beside figures published for TensorRT-LLM."""

from __future__ import annotations

import time
from collections.abc import Mapping

from loadtests.bench import prompts
from loadtests.bench.effort import Effort
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Workload

_PROMPT, _OUTPUT = 128, 128
PUBLISHED = "TensorRT-LLM, H100, published"
_PUBLISHED_MS = {32: 706.0, 64: 1137.0, 128: 1999.0}  # milliseconds for 128 new tokens, by batch


class XL(Workload):
    """Ours only, on CUDA only: the weights are drawn on the card."""

    name = "xl"
    metrics = (Metric("milliseconds", "ms", higher_is_better=False),)
    ours_only = True
    home = "card"

    def cases(self, effort: Effort) -> list[Case]:
        del effort
        return [{"name": f"batch {count}, {_PROMPT} in, {_OUTPUT} out", "count": count} for count in _PUBLISHED_MS]

    def measure(self, system: System, case: Case, key: str) -> Measured:
        batch = prompts.equal(prompts.generator(key), case["count"], _PROMPT, _OUTPUT, system.vocab_size)
        began = time.perf_counter()
        system.generate(batch)  # the last token's id has come to the host, so the card is done
        return Measured({"milliseconds": 1000 * (time.perf_counter() - began)})

    def published(self, case: Case) -> Mapping[str, tuple[str, float]]:
        return {"milliseconds": (PUBLISHED, _PUBLISHED_MS[case["count"]])}
