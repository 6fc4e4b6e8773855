"""The engine's promises, one by one, on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch

from serve.engine.model import T5Model
from serve.engine.runner import ModelRunner
from serve.engine.scheduler import ScoreChunk, StepPlan
from serve.engine.sequence import Prompt
from serve.output import IMPOSSIBLE_LOGPROB, FinishReason
from serve.sampling_params import SamplingParams
from tests.engine.driving import Results, Watching, assert_idle, drain, engine_of, run_alone

EOS = 1
PROMPT = (5, 6, 7, 8, EOS)
OTHER = (9, 10, 11, EOS)


class Faulty(ModelRunner):
    """Disturbs single requests: prompts that begin with 66 cannot be encoded, `poisoned` requests give NaN."""

    def __init__(self, model: T5Model) -> None:
        super().__init__(model, cache_bytes=1 << 30)
        self.poisoned: dict[str, float] = {}
        self.decode_fails = False
        self.score_fails = False

    def encode(self, prompts: SequenceOf[Prompt]) -> None:
        if any(prompt.token_ids[0] == 66 for prompt in prompts):
            raise MemoryError("out of memory")
        super().encode(prompts)

    def decode(self, plan: StepPlan) -> Any:
        if self.decode_fails:
            raise RuntimeError("the device is gone")
        logits = super().decode(plan)
        assert isinstance(logits, torch.Tensor)
        for row, sequence in enumerate(plan.decode):
            if sequence.request_id in self.poisoned and sequence.position == 3:
                logits[row, 17] = self.poisoned[sequence.request_id]
        return logits

    def score(self, chunk: ScoreChunk) -> list[float]:
        if self.score_fails:
            raise RuntimeError("no scores today")
        return super().score(chunk)


def greedy_ids(model: T5Model, prompt: tuple[int, ...], max_tokens: int = 12) -> list[int]:
    result, _ = run_alone(model, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return result.token_ids


def test_eos_ends_with_stop_and_is_part_of_the_output(model: T5Model) -> None:
    engine = engine_of(model)
    bias = {EOS: 100.0}
    engine.add("r", [PROMPT], SamplingParams(max_tokens=20, min_tokens=4, logit_bias=bias, logprobs=1))
    result = drain(engine).sequences["r", 0]
    assert len(result.token_ids) == 5
    assert EOS not in result.token_ids[:4]
    assert result.token_ids[4] == EOS
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert result.finish_reason is FinishReason.STOP
    assert_idle(engine)


def test_max_tokens_ends_with_length_even_where_eos_would_come_next(model: T5Model) -> None:
    engine = engine_of(model)
    params = {"min_tokens": 4, "logit_bias": {EOS: 100.0}}
    for limit in (4, 5, 6):
        engine.add(str(limit), [PROMPT], SamplingParams(max_tokens=limit, **params))  # type: ignore[arg-type]
    results = drain(engine)
    reasons = [results.sequences[str(limit), 0].finish_reason for limit in (4, 5, 6)]
    assert reasons == [FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP]
    assert [len(results.sequences[str(limit), 0].token_ids) for limit in (4, 5, 6)] == [4, 5, 5]


def test_ignore_eos_keeps_it_and_goes_on(model: T5Model) -> None:
    engine = engine_of(model)
    engine.add("r", [PROMPT], SamplingParams(max_tokens=6, ignore_eos=True, logit_bias={EOS: 100.0}))
    result = drain(engine).sequences["r", 0]
    assert result.token_ids == [EOS] * 6
    assert result.finish_reason is FinishReason.LENGTH


def test_n_sequences_share_one_encoding(model: T5Model) -> None:
    runner = Watching(model, cache_bytes=1 << 30)
    engine = engine_of(model, runner, max_running_sequences=8)
    params = SamplingParams(max_tokens=10, n=20, temperature=1.0, seed=5, ignore_eos=True)  # more than run at once
    engine.add("r", [PROMPT], params)
    results = drain(engine)
    assert runner.encode_sizes == [len(PROMPT)]
    assert len(results.sequences) == 20
    assert len({tuple(result.token_ids) for result in results.sequences.values()}) > 10
    assert results.started == ["r"]
    assert_idle(engine, runner)


@pytest.mark.parametrize("widths", [(1, 6), (6, 1), (5, 7), (2, 4), (1, 1)])
def test_prompts_of_one_capacity_with_few_and_many_sequences(model: T5Model, widths: tuple[int, int]) -> None:
    engine = engine_of(model)
    for prompt, width in zip((PROMPT, OTHER), widths, strict=True):
        engine.add(str(prompt), [prompt], SamplingParams(max_tokens=12, n=width, ignore_eos=True))
    results = drain(engine)
    for prompt, width in zip((PROMPT, OTHER), widths, strict=True):
        for index in range(width):
            assert results.sequences[str(prompt), index].token_ids == greedy_ids(model, prompt)


def test_a_list_of_prompts_is_numbered_prompt_times_n(model: T5Model) -> None:
    engine = engine_of(model)
    engine.add("r", [PROMPT, OTHER], SamplingParams(max_tokens=12, n=2, ignore_eos=True))
    results = drain(engine)
    assert [results.sequences["r", index].token_ids for index in range(4)] == [
        greedy_ids(model, prompt) for prompt in (PROMPT, PROMPT, OTHER, OTHER)
    ]


def test_seeds(model: T5Model) -> None:
    params = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    engine = engine_of(model)
    for name, prompts, seed in (
        ("one", [PROMPT], 7),
        ("two", [PROMPT], 7),
        ("list", [OTHER, PROMPT], 7),
        ("other", [PROMPT], 8),
        ("free", [PROMPT, PROMPT], None),
        ("free too", [PROMPT], None),
    ):
        engine.add(name, prompts, SamplingParams(seed=seed, **params))  # type: ignore[arg-type]
    texts = {key: tuple(result.token_ids) for key, result in drain(engine).sequences.items()}
    assert texts["one", 0] == texts["two", 0] == texts["list", 1]
    different = [texts[key] for key in (("one", 0), ("other", 0), ("free", 0), ("free", 1), ("free too", 0))]
    assert len(set(different)) == 5


def test_ids_beyond_the_vocabulary_limit_never_come(model: T5Model) -> None:
    engine = engine_of(model)
    params = SamplingParams(max_tokens=40, n=8, temperature=2.0, seed=3, logprobs=20, ignore_eos=True)
    engine.add("r", [PROMPT], params)
    engine.add_score("s", PROMPT, [(5, 381, EOS), (5, EOS)])
    results = drain(engine)
    for result in results.sequences.values():
        assert max(result.token_ids) < 380
        assert max(token_id for entry in result.logprobs for token_id, _ in entry.top) < 380
    (beyond, _), (within, _) = results.scores["s"].scores
    assert beyond < IMPOSSIBLE_LOGPROB / 2 < within


def test_a_prompt_that_cannot_be_encoded_ends_alone(model: T5Model) -> None:
    runner = Faulty(model)
    engine = engine_of(model, runner)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    engine.add("before", [PROMPT], params)
    engine.add("guilty", [(66, EOS)], SamplingParams(max_tokens=12, n=3))
    engine.add("after", [OTHER], params)
    engine.add_score("guilty score", (66, 67, EOS), [(5, EOS)])
    results = drain(engine)
    for index in range(3):
        guilty = results.sequences["guilty", index]
        assert guilty.finish_reason is FinishReason.ERROR
        assert guilty.token_ids == []
        assert guilty.error == "the prompt could not be encoded: MemoryError"
    assert results.scores["guilty score"].error == "the prompt could not be encoded: MemoryError"
    assert results.sequences["before", 0].token_ids == greedy_ids(model, PROMPT)
    assert results.sequences["after", 0].token_ids == greedy_ids(model, OTHER)
    assert_idle(engine, runner)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sequence_whose_logits_are_not_finite_ends_alone(model: T5Model, value: float) -> None:
    runner = Faulty(model)
    engine = engine_of(model, runner)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for name, prompt in (("before", PROMPT), ("poisoned", OTHER), ("after", PROMPT)):
        engine.add(name, [prompt], params)
    runner.poisoned["poisoned"] = value
    results = drain(engine)
    poisoned = results.sequences["poisoned", 0]
    assert poisoned.finish_reason is FinishReason.ERROR
    assert "not finite" in (poisoned.error or "")
    assert poisoned.token_ids == greedy_ids(model, OTHER)[:3]
    assert results.sequences["before", 0].token_ids == greedy_ids(model, PROMPT)
    assert results.sequences["after", 0].token_ids == greedy_ids(model, PROMPT)
    assert_idle(engine, runner)


def test_garbage_that_is_not_finite_never_stays_in_the_cache(model: T5Model) -> None:
    """A row that held NaN is clean for the next one, also where that one is shorter and masks the rest."""
    runner = ModelRunner(model, cache_bytes=1 << 30)
    engine = engine_of(model, runner)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    engine.add("long", [PROMPT], params)  # keeps the slabs alive
    engine.add("sick", [tuple(range(20, 33))], params)
    for _ in range(8):
        engine.step()
    with torch.inference_mode():
        for rows in (runner.cache.self_rows, runner.cache.cross_rows):
            rows.row(16, 1)[:] = float("nan")
    results = drain(engine, Results())
    assert results.sequences["sick", 0].finish_reason is FinishReason.ERROR
    engine.add("keeper", [PROMPT], params)
    engine.step()
    engine.add("next", [OTHER], SamplingParams(max_tokens=12, ignore_eos=True))
    assert drain(engine).sequences["next", 0].token_ids == greedy_ids(model, OTHER)
    assert_idle(engine, runner)


def test_a_failed_scoring_ends_alone_and_a_failed_decode_ends_all(model: T5Model) -> None:
    runner = Faulty(model)
    engine = engine_of(model, runner)
    runner.score_fails = True
    engine.add("r", [PROMPT], SamplingParams(max_tokens=12, ignore_eos=True))
    engine.add_score("s", OTHER, [(5, EOS)])
    results = drain(engine)
    assert results.scores["s"].error == "scoring failed: RuntimeError: no scores today"
    assert results.sequences["r", 0].token_ids == greedy_ids(model, PROMPT)
    runner.decode_fails = True
    engine.add("r", [PROMPT], SamplingParams(max_tokens=12))
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()


@pytest.mark.parametrize(
    ("prompt", "message"), [((), "no tokens"), ((5, 384), "token id"), ((-1, 1), "token id"), ((5,) * 4000, "cache")]
)
def test_what_can_never_run_is_refused_in_the_next_step(model: T5Model, prompt: tuple[int, ...], message: str) -> None:
    engine = engine_of(model, cache_bytes=1 << 20)
    engine.add("r", [PROMPT, prompt], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add_score("s", prompt, [(5, EOS)])
    results = drain(engine)
    assert message in (results.sequences["r", 1].error or "")
    assert results.sequences["r", 1].finish_reason is FinishReason.ERROR
    assert results.sequences["r", 0].finish_reason is FinishReason.LENGTH
    assert message in (results.scores["s"].error or "")
    assert_idle(engine)


def test_abort_and_finish_free_room_at_once(model: T5Model) -> None:
    engine = engine_of(model, max_running_sequences=2)
    params = SamplingParams(max_tokens=50, n=2, ignore_eos=True)
    engine.add("runs", [PROMPT], params)
    engine.add("waits", [OTHER], params)
    engine.add_score("scores", OTHER, [(5, EOS)])
    engine.step()
    engine.abort("waits")
    engine.abort("scores")
    engine.abort("unknown")
    engine.finish("runs", 0)
    engine.finish("runs", 0)
    engine.finish("unknown", 0)
    output = engine.step()
    assert [delta.index for delta in output.deltas["runs"]] == [1]
    engine.abort("runs")
    assert engine.has_work  # so that the gauges are told
    stats = engine.step().stats
    assert stats is not None
    assert (stats.sequences_running, stats.requests_waiting) == (0, 0)
    assert_idle(engine)


def test_a_request_id_in_use_is_refused(model: T5Model) -> None:
    engine = engine_of(model)
    engine.add("r", [PROMPT], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="in use"):
        engine.add("r", [PROMPT], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="in use"):
        engine.add_score("r", PROMPT, [(5, EOS)])
    drain(engine)


def test_saved_prompts_are_used_again_and_bounded(model: T5Model) -> None:
    runner = Watching(model, cache_bytes=1 << 30)
    per_token = 2 * 2 * 64 * 4
    engine = engine_of(model, runner, encoder_cache_bytes=10 * per_token)  # room for two such prompts
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [PROMPT, OTHER, PROMPT, (12, 13, 14, 15, EOS), OTHER]
    hits = 0
    for number, prompt in enumerate(prompts):
        engine.add(str(number), [prompt], params)
        results = drain(engine)
        hits += sum(output.stats.encoder_cache_hits for output in results.steps if output.stats)
        assert results.sequences[str(number), 0].token_ids == greedy_ids(model, prompt)
        assert runner.cache.saved_bytes <= 10 * per_token
    assert hits == 1  # PROMPT the second time; OTHER had gone when the fourth came
    assert len(runner.encode_sizes) == 4


def test_memory_follows_use(model: T5Model) -> None:
    runner = ModelRunner(model, cache_bytes=1 << 30)
    engine = engine_of(model, runner)
    engine.add("short", [PROMPT], SamplingParams(max_tokens=100, ignore_eos=True))
    engine.step()
    token_bytes = model.cache_row.bytes_per_token
    assert runner.cache.cross_rows.allocated_bytes == 16 * token_bytes
    assert runner.cache.self_rows.allocated_bytes == 16 * token_bytes
    for number in range(20):
        engine.add(str(number), [OTHER], SamplingParams(max_tokens=40, ignore_eos=True))
    before = 0
    while engine.has_work:
        used = engine.scheduler.room.used_bytes
        engine.step()
        allocated = runner.cache.self_rows.allocated_bytes + runner.cache.cross_rows.allocated_bytes
        assert allocated <= 4 * max(before, used, engine.scheduler.room.used_bytes)
        before = used
    engine.add("last", [PROMPT], SamplingParams(max_tokens=2))
    drain(engine)
    engine.abort("nobody")
    engine.step()
    assert runner.cache.self_rows.allocated_bytes == runner.cache.cross_rows.allocated_bytes == 0


def test_a_decode_step_between_encode_batches(model: T5Model) -> None:
    runner = Watching(model, cache_bytes=1 << 30)
    engine = engine_of(model, runner, encode_tokens_per_step=8)
    engine.add("stream", [PROMPT], SamplingParams(max_tokens=30, ignore_eos=True))
    engine.step()
    for number in range(10):
        prompt = (20 + number, *range(40, 50 + number), EOS)
        engine.add(str(number), [prompt], SamplingParams(max_tokens=5, ignore_eos=True))
    while engine.has_work:
        before = len(runner.encode_sizes)
        output = engine.step()
        assert len(runner.encode_sizes) - before <= 1
        running = [d for d in output.deltas.get("stream", []) if d.token_ids]
        if len(runner.encode_sizes) > before:
            assert len(running) == 1  # its token came in the very step that encoded for another
    assert len(runner.encode_sizes) == 11
