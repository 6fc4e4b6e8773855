"""In a crowd every result equals its result alone: whatever joins, leaves, is cancelled or preempted."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from serve.engine.model import T5Model
from serve.sampling_params import SamplingParams
from tests.engine.driving import Results, Watching, assert_idle, drain, engine_of, run_alone, same_up_to_near_tie

CANDIDATES = [(5, 1), (6, 7, 8, 1), tuple(range(20, 60)), (9, 1), (1,)]


@dataclass
class Guest:
    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrives: int  # step
    leaves: int | None  # step at which it is aborted


def make_guests(count: int, *, seed: int, max_prompt: int, max_tokens: int) -> list[Guest]:
    rng = random.Random(seed)
    guests = []
    prompts: list[tuple[int, ...]] = []
    for number in range(count):
        length = 1 if number == 0 else max_prompt if number == 1 else int(max_prompt ** rng.random())
        prompt = (*(rng.randrange(2, 380) for _ in range(length - 1)), 1)
        if prompts and rng.random() < 0.15:
            prompt = rng.choice(prompts)
        prompts.append(prompt)
        sampling = rng.choice(
            [
                {},
                {},
                {"temperature": 0.8, "seed": rng.randrange(2**40)},
                {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": -number},
                {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "logprobs": 2},
                {"ignore_eos": True, "min_tokens": 3},
            ]
        )
        params = SamplingParams(max_tokens=rng.randint(1, max_tokens), n=rng.randint(1, 4), **sampling)  # type: ignore[arg-type]
        arrives = rng.randrange(60)
        leaves = arrives + rng.randrange(20) if number % 3 == 2 else None
        guests.append(Guest(f"g{number}", prompt, params, arrives, leaves))
    return guests


def play(model: T5Model, guests: list[Guest], **settings: int) -> tuple[Results, Watching, int]:
    """Let the guests come and go; returns what came, the runner, and the number of preemptions."""
    runner = Watching(model, cache_bytes=settings.get("cache_bytes", 1 << 30))
    engine = engine_of(model, runner, **settings)
    preempt, preemptions = engine.scheduler._preempt, 0

    def counted(item: object) -> None:
        nonlocal preemptions
        preemptions += 1
        preempt(item)  # type: ignore[arg-type]

    engine.scheduler._preempt = counted  # type: ignore[method-assign]
    results = Results()
    for step in range(85):
        if step % 9 == 3:
            engine.add_score(f"score{step}", guests[step % len(guests)].prompt, CANDIDATES)
        for guest in guests:
            if guest.arrives == step:
                engine.add(guest.request_id, [guest.prompt], guest.params)
            if guest.leaves == step:
                engine.abort(guest.request_id)
        if engine.has_work:
            results.take(engine.step())
    drain(engine, results)
    assert_idle(engine, runner)
    last = results.steps[-1].stats
    assert last is not None
    assert last.sequences_running == last.requests_waiting == 0
    assert last.cache_usage == (("self", 0.0), ("cross", 0.0))
    return results, runner, preemptions


def check_against_alone(model: T5Model, guests: list[Guest], results: Results) -> int:
    """Every sequence of every guest who stayed equals itself alone; returns how many near ties excused one."""
    near_ties = 0
    for guest in guests:
        if guest.leaves is not None:
            continue
        for index in range(guest.params.n):
            crowd = results.sequences[guest.request_id, index]
            alone, margins = run_alone(model, guest.prompt, guest.params, index=index)
            equal, tie = same_up_to_near_tie(crowd.token_ids, alone.token_ids, margins)
            assert equal, (guest.request_id, index, guest.params, crowd.token_ids, alone.token_ids)
            near_ties += tie
            if not tie:
                assert crowd.finish_reason == alone.finish_reason
                for ours, theirs in zip(crowd.logprobs, alone.logprobs, strict=True):
                    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    assert len(results.scores) == 10
    for request_id, crowd_scores in results.scores.items():
        engine = engine_of(model)
        engine.add_score("alone", guests[int(request_id.removeprefix("score")) % len(guests)].prompt, CANDIDATES)
        alone_scores = drain(engine).scores["alone"]
        for (here, _), (there, _) in zip(crowd_scores.scores, alone_scores.scores, strict=True):
            assert here == pytest.approx(there, abs=1e-3)
    return near_ties


def test_crowd_equals_alone(model: T5Model) -> None:
    guests = make_guests(64, seed=1, max_prompt=1500, max_tokens=60)
    results, runner, _ = play(model, guests, max_running_sequences=24, encode_tokens_per_step=512)
    near_ties = check_against_alone(model, guests, results)
    assert near_ties <= 3
    assert max(runner.decode_sizes) == 24
    longest = max(len(guest.prompt) for guest in guests)
    assert longest == 1500
    assert all(size <= 512 or size in {len(guest.prompt) for guest in guests} for size in runner.encode_sizes)


def test_preempted_equals_undisturbed(model: T5Model) -> None:
    """A cache of 64 KiB holds one prompt of 128 tokens, or a few short sequences; nobody loses a token."""
    guests = make_guests(20, seed=2, max_prompt=100, max_tokens=60)
    per_token = 2 * 2 * 64 * 4  # layers x (key, value) x inner x float32
    results, runner, preemptions = play(
        model, guests, cache_bytes=400 * per_token, encoder_cache_bytes=100 * per_token, max_running_sequences=16
    )
    assert preemptions > 10
    assert check_against_alone(model, guests, results) <= 1
    assert runner.cache.self_rows.allocated_bytes == 0
    assert runner.cache.cross_rows.allocated_bytes == 0
