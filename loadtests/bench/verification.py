"""Is it the same model everywhere? Greedy tokens and a score of a few prompts, from every system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtests.bench import prompts
from loadtests.bench.system import System
from loadtests.bench.workloads.quality import agreeing

_LENGTHS = (5, 9, 17, 24)  # tokens of the prompts
_OUTPUT = 16
WANTED = 0.95  # share of equal tokens of float32 systems below which something is wrong; near ties may differ


def produce(system: System, key: str) -> dict[str, Any]:
    """What one system makes of the prompts of `key`: {"tokens": [[int]], "scores": [float]}."""
    rng = prompts.generator(key)
    asked = [prompts.equal(rng, 1, length, _OUTPUT, system.vocab_size)[0] for length in _LENGTHS]
    candidates = [prompts.prompt(rng, 5, system.vocab_size) for _ in asked]
    scores = [system.score(request.ids, [one])[0] for request, one in zip(asked, candidates, strict=True)]
    return {"tokens": system.generate(asked), "scores": scores}


def agreement(produced: Mapping[str, dict[str, Any]], reference: str) -> dict[str, dict[str, float]]:
    """Of every system but the reference: the share of tokens that agree up to the first that does not, and how far
    the worst score is off."""
    expected = produced[reference]
    total = sum(map(len, expected["tokens"]))
    result = {}
    for name, own in produced.items():
        if name == reference:
            continue
        same = sum(agreeing(a, b) for a, b in zip(own["tokens"], expected["tokens"], strict=True))
        errors = [abs(a - b) for a, b in zip(own["scores"], expected["scores"], strict=True)]
        result[name] = {"equal_tokens": same / total, "largest_score_error": max(errors)}
    return result
