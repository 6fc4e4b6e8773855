"""Driving an engine in tests: requests run to their end, alone or in a crowd, and the margins of their choices."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from serve.engine import sampler
from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.engine.loading import make_engine
from serve.engine.model import T5Model
from serve.engine.runner import ModelRunner
from serve.engine.sampler import BestTokens, Sampled
from serve.engine.scheduler import StepPlan
from serve.engine.sequence import Sequence
from serve.engine.step_output import ScoreResult, StepOutput
from serve.output import FinishReason, TokenLogprob
from serve.sampling_params import SamplingParams

NEAR_TIE = 1e-3  # logits closer than this may swap places between two batches
NEAR_EDGE = 1e-5  # a draw this near to the edge between two tokens may fall on either side


@dataclass
class Result:
    """What one sequence produced."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass
class Results:
    """What an engine produced so far."""

    sequences: dict[tuple[str, int], Result] = field(default_factory=dict)
    scores: dict[str, ScoreResult] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    steps: list[StepOutput] = field(default_factory=list)

    def take(self, output: StepOutput) -> None:
        self.steps.append(output)
        self.started += output.started
        self.scores |= output.scores
        for request_id, deltas in output.deltas.items():
            for delta in deltas:
                result = self.sequences.setdefault((request_id, delta.index), Result())
                assert result.finish_reason is None, "a delta after the last one"
                result.token_ids += delta.token_ids
                result.logprobs += delta.logprobs
                result.finish_reason = delta.finish_reason
                result.error = delta.error


class Watching(ModelRunner):
    """Keeps, per sequence and token position, the distance between the two best logits that it chose from."""

    def __init__(self, model: T5Model, *, cache_bytes: int) -> None:
        super().__init__(model, cache_bytes=cache_bytes)
        self.margins: dict[tuple[str, int], dict[int, float]] = {}
        self.decode_sizes: list[int] = []
        self.encode_sizes: list[int] = []

    def encode(self, prompts: Any) -> None:
        self.encode_sizes.append(sum(len(prompt.token_ids) for prompt in prompts))
        super().encode(prompts)

    def sample(self, logits: torch.Tensor | BestTokens, plan: StepPlan) -> Sampled:
        assert isinstance(logits, torch.Tensor), "a small vocabulary has no shortlist"
        self.decode_sizes.append(len(plan.decode))
        sampled = super().sample(logits, plan)  # leaves penalties and bias in `logits`
        best = logits.topk(2, dim=-1).values
        unsure = unsure_draws(logits, plan.decode)
        for row, (sequence, margin) in enumerate(zip(plan.decode, (best[:, 0] - best[:, 1]).tolist(), strict=True)):
            if not sequence.params.greedy:
                margin = 0.0 if row in unsure else 1.0
            margins = self.margins.setdefault((sequence.request_id, sequence.index), {})
            margins.setdefault(sequence.position, margin)
        return sampled


def unsure_draws(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> set[int]:
    """Rows whose draw falls so near the edge between two tokens that rounding may push it over."""
    rows = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    drawn = []
    for shift in (-NEAR_EDGE, NEAR_EDGE) if rows else ():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "uniform", lambda *key, shift=shift, real=sampler.uniform: real(*key) + shift)
            drawn.append(sampler._draw(logits[rows], [sequences[row] for row in rows]).tolist())
    return {row for row, low, high in zip(rows, *drawn, strict=True) if low != high} if rows else set()


def engine_of(model: T5Model, runner: ModelRunner | None = None, **settings: Any) -> Engine:
    return make_engine(model, EngineSettings(**settings), runner)


def drain(engine: Engine, results: Results | None = None) -> Results:
    """Step until there is nothing to do."""
    results = Results() if results is None else results
    while engine.has_work:
        results.take(engine.step())
    return results


def run_alone(
    model: T5Model, prompt: SequenceOf[int], params: SamplingParams, *, index: int = 0
) -> tuple[Result, dict[int, float]]:
    """Sequence `index` of a request that is alone in its engine, and its margins."""
    runner = Watching(model, cache_bytes=1 << 30)
    engine = engine_of(model, runner)
    engine.add("alone", [tuple(prompt)], params)
    results = drain(engine)
    return results.sequences["alone", index], runner.margins["alone", index]


def same_up_to_near_tie(crowd: list[int], alone: list[int], margins: dict[int, float]) -> tuple[bool, bool]:
    """(equal as far as can be asked, a near tie was met).

    Two results may differ from the first position on where the two best logits are closer than NEAR_TIE, or the draw
    is within NEAR_EDGE of another token.
    """
    for position in range(max(len(crowd), len(alone))):
        here = crowd[position : position + 1], alone[position : position + 1]
        if here[0] != here[1]:
            tie = margins.get(position, 1.0) < NEAR_TIE
            return tie, tie
    return True, False


def assert_idle(engine: Engine, runner: ModelRunner | None = None) -> None:
    """Every slot and byte is free, and the gauges say so."""
    scheduler = engine.scheduler
    assert not engine.has_work
    assert not scheduler.running
    assert not scheduler.waiting
    assert not scheduler.scoring
    assert scheduler.room.used_bytes == 0
    assert scheduler.self_pool.rows() == {}
    assert scheduler.cross_pool.rows() == {}
    assert scheduler.requests_waiting == 0
    assert not scheduler._prompts
    assert not scheduler._started
    assert not engine._sequences
    assert not engine._jobs
    if runner is not None:
        assert runner.cache.saved_bytes == scheduler.saved.used_bytes
