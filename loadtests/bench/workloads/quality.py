"""What a faster setting costs: greedy tokens and scores of every setting of ours beside float32's."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.bench import modes, prompts
from loadtests.bench.effort import Effort
from loadtests.bench.shapes import EOS_ID
from loadtests.bench.system import System
from loadtests.bench.workloads.base import Case, Measured, Metric, Row, Workload

DEMO = Path(__file__).parents[3] / "serve" / "demo"
_MAX_TOKENS = 48
_SCORED = 4  # candidates of a prompt: words, ids drawn from the prompts' own
_FORMS = (
    "How many words are in the list? {0}, {1}, {2}, {3}",
    "Take the last letters of {0} {1} and join them.",
    "Is this review positive or negative? I loved the {0}, it was {1}.",
    "Which category does the question belong to? Where did the {0} meet the {1}?",
    "Find the odd one out. {0}, {1}, {2}, {3}",
    "A coin is heads up. {0} flips the coin. {1} does not flip the coin. Is the coin still heads up?",
    "There are {4} {0}s and {5} more come. How many {0}s are there?",
    "What kind of thing is a {0}? Think of the {1} and the {2} first.",
)
_WORDS = [
    "garden",
    "copper",
    "lemon",
    "spinach",
    "north",
    "winter",
    "baker",
    "violin",
    "river",
    "pencil",
    "teacher",
    "orange",
    "cotton",
    "engine",
    "window",
    "letter",
    "tiger",
    "castle",
    "butter",
    "silver",
    "mountain",
    "doctor",
    "candle",
    "basket",
    "summer",
    "planet",
    "ladder",
    "onion",
    "market",
    "harbor",
    "pepper",
    "wagon",
]


class Quality(Workload):
    """Ours only, on a trained checkpoint: the bundled demo unless another is given."""

    name = "quality"
    metrics = (
        Metric("token_agreement", "share"),
        Metric("identical_prompts", "share"),
        Metric("score_correlation", "Pearson"),
    )
    ours_only = True
    home = "checkpoint"
    max_rounds = 1

    def cases(self, effort: Effort) -> list[Case]:
        return [{"name": f"{effort.quality_prompts} prompts", "count": effort.quality_prompts}]

    def measure(self, system: System, case: Case, key: str) -> Measured:
        """Greedy tokens up to EOS, and the scores of some candidates, of every prompt."""
        from loadtests.bench.our_system import Job, ours
        from serve.sampling_params import SamplingParams

        asked: list[list[int]] = case["ids"]
        params = SamplingParams(max_tokens=_MAX_TOKENS)
        tokens: list[list[int]] = [[] for _ in asked]
        jobs = [Job(place, tuple(ids), params) for place, ids in enumerate(asked)]
        ours(system).run(jobs, lambda place, _index, ids: tokens[place].extend(ids))
        rng = prompts.generator("candidates")
        pool = sorted({token for ids in asked for token in ids} - {EOS_ID})
        scores = [system.score(ids, [(rng.choice(pool), EOS_ID) for _ in range(_SCORED)]) for ids in asked]
        return Measured({}, {"tokens": tokens, "scores": [score for some in scores for score in some]})

    def trial(self, system: System, case: Case, key: str) -> float:
        del system, case, key  # nothing is timed, so nothing is warmed up
        return 0.0

    def finish(self, rows: Sequence[Row], data: Sequence[dict[str, Any]]) -> None:
        reference = next((d for row, d in zip(rows, data, strict=True) if row["setting"] == modes.REFERENCE), None)
        for row, own in zip(rows, data, strict=True):
            if reference is not None:
                row["metrics"] |= compare(own, reference)


def compare(own: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The three metrics of a setting's tokens and scores against the reference's."""
    pairs = list(zip(own["tokens"], reference["tokens"], strict=True))
    same = sum(agreeing(a, b) for a, b in pairs)
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    metrics = {
        "token_agreement": same / longest if longest else 1.0,
        "identical_prompts": sum(a == b for a, b in pairs) / len(pairs),
        "score_correlation": pearson(own["scores"], reference["scores"]),
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs.

    >>> agreeing([5, 6, 7], [5, 6, 8, 9])
    2
    """
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of two equally long lists; NaN where one of them is constant.

    >>> round(pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]), 6)
    1.0
    """
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    products = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    norm = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return products / norm if norm > 0 else math.nan


def texts(count: int, seed: int, path: Path | None = None) -> list[str]:
    """Prompts: the first `count` lines of a JSONL file (a string, or an object with "prompt"), or made-up ones.

    Raises:
        ValueError: a line that is neither.
    """
    if path is None:
        rng = random.Random(seed)
        return [_made_up(rng) for _ in range(count)]
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:count], start=1):
        value = json.loads(line)
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: neither a string nor an object with "prompt"')
        found.append(text)
    return found


def _made_up(rng: random.Random) -> str:
    return rng.choice(_FORMS).format(*rng.sample(_WORDS, 4), rng.randint(2, 60), rng.randint(2, 60))


def encode(folder: Path, prompts_: Sequence[str]) -> tuple[list[list[int]], int]:
    """(ids of each prompt with EOS, the tokenizer's size), by the checkpoint's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [list(tokenizer.encode(text).ids) for text in prompts_]
    ids = [[*(token for token in some if token != EOS_ID), EOS_ID] for some in encoded]
    return ids, int(tokenizer.get_vocab_size())
