"""Each sampling field on logits that one can check by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from serve.engine import sampler
from serve.engine.sampler import Sampled, uniform
from serve.engine.sequence import Sequence
from serve.output import IMPOSSIBLE_LOGPROB
from serve.sampling_params import SamplingParams

EOS = 1


def sequence(tokens: tuple[int, ...] = (), *, seed: int = 0, index: int = 0, **params: Any) -> Sequence:
    made = Sequence("r", index, (5, EOS), SamplingParams(max_tokens=50, **params), seed, 0)
    made.token_ids = list(tokens)
    made.position = len(tokens)
    return made


def sample(logits: list[list[float]], *sequences: Sequence) -> Sampled:
    return sampler.sample(torch.tensor(logits), sequences, eos_token_id=EOS)


def draws(count: int, logits: list[float], **params: Any) -> Counter[int]:
    sequences = [sequence(seed=seed, **params) for seed in range(count)]
    return Counter(sample([logits] * count, *sequences).token_ids)


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    assert sample([[0.0, 3.0, 3.0, 1.0], [4.0, 3.0, 3.0, 1.0]], sequence(), sequence()).token_ids == [1, 0]


@pytest.mark.parametrize("vocabulary", [100, 256, 257, 384, 1000, 32100])
def test_two_stage_argmax_is_argmax(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, vocabulary, generator=generator)
    assert torch.equal(sampler._argmax(logits, sampler._block_maxima(logits)), logits.argmax(-1))
    for column in (0, 90, vocabulary // 2, vocabulary - 1):
        logits[0] = 0.0
        logits[0, column:] = 1.0
        assert int(sampler._argmax(logits, sampler._block_maxima(logits))[0]) == column


def test_uniform_is_spread_and_depends_on_each_part_alone() -> None:
    values = [uniform(seed, sample, position) for seed in range(20) for sample in range(20) for position in range(20)]
    assert len(set(values)) == len(values)
    assert all(0.0 <= value < 1.0 for value in values)
    counts = Counter(int(value * 10) for value in values)
    assert all(700 < counts[tenth] < 900 for tenth in range(10))
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    # Pinned: seeded results must not change from release to release.
    assert uniform(42, 3, 7) == pytest.approx(0.4870637332, abs=1e-9)


def test_draws_follow_the_distribution() -> None:
    counts = draws(4000, [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)], temperature=1.0)
    for token_id, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert counts[token_id] / 4000 == pytest.approx(share, abs=0.03)
    sharper = draws(4000, [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)], temperature=0.5)
    assert sharper[3] / 4000 == pytest.approx(16 / 30, abs=0.03)


def test_top_k_and_top_p() -> None:
    logits = [math.log(p) for p in (0.05, 0.15, 0.3, 0.5)]
    assert set(draws(300, logits, temperature=1.0, top_k=2)) == {2, 3}
    assert set(draws(300, logits, temperature=1.0, top_k=1)) == {3}
    assert set(draws(300, logits, temperature=1.0, top_p=0.79)) == {2, 3}
    assert set(draws(300, logits, temperature=1.0, top_p=0.81)) == {1, 2, 3}
    assert set(draws(300, logits, temperature=1.0, top_p=1e-6)) == {3}
    # top-p looks at what top-k left: 0.3 and 0.5 are 0.375 and 0.625 there.
    assert set(draws(300, logits, temperature=1.0, top_k=2, top_p=0.6)) == {3}


def test_limits_that_leave_many_tokens() -> None:
    """Beyond the candidates that are looked at first, the same rules hold."""
    logits = [2.0] * 10 + [1.0] * 500 + [-9.0] * 490
    heavy = 10 * math.exp(2.0) / (10 * math.exp(2.0) + 500 * math.e + 490 * math.exp(-9.0))
    counts = draws(500, logits, temperature=1.0, top_p=0.9)
    assert max(counts) < 510
    assert sum(counts[token_id] for token_id in range(10)) / 500 == pytest.approx(heavy / 0.95, abs=0.05)
    assert max(draws(500, logits, temperature=2.0, top_k=510)) < 510
    flat = [0.0] * 5000
    assert 4500 < max(draws(500, flat, temperature=1.0, top_p=0.99)) < 5000
    assert max(draws(500, logits, temperature=1.0)) <= 999


def test_both_ways_of_drawing_agree() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 2000, generator=generator) * 4
    numbers = torch.rand(50, 1, generator=generator, dtype=torch.float64)
    for top_k, top_p in ((40, 1.0), (200, 0.7), (2000, 0.6), (3, 0.9)):
        limits = torch.full((50, 1), top_k), torch.full((50, 1), top_p, dtype=torch.float64)
        among_best, enough = sampler._draw_among_best(logits, numbers, *limits, 256)
        among_all = sampler._draw_among_all(logits, numbers, *limits)
        assert int(enough.sum()) > 40
        assert torch.equal(among_best[enough], among_all[enough])


def test_rows_do_not_depend_on_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 500, generator=generator) * 3
    sequences = [
        sequence(),
        sequence(temperature=1.0, seed=1),
        sequence(temperature=0.7, top_k=5, seed=2),
        sequence(temperature=1.0, top_p=0.5, seed=3),
        sequence((3, 3, 4), repetition_penalty=1.5, logprobs=3),
        sequence(logit_bias={7: 50.0}, min_tokens=2, logprobs=0),
    ]
    together = sampler.sample(logits.clone(), sequences, eos_token_id=EOS)
    for row, one in enumerate(sequences):
        alone = sampler.sample(logits[row : row + 1].clone(), [one], eos_token_id=EOS)
        assert alone.token_ids == [together.token_ids[row]]
        assert alone.logprobs.get(0) == together.logprobs.get(row)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = [[2.0, 1.9, -1.0, 0.0]]
    result = sample(logits, sequence((0, 0, 2), repetition_penalty=2.0, logprobs=4))
    assert result.token_ids == [1]
    expected = torch.tensor([1.0, 1.9, -2.0, 0.0]).log_softmax(-1)
    for token_id, logprob in result.logprobs[0].top:
        assert logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
    assert sample(logits, sequence(repetition_penalty=2.0)).token_ids == [0]  # nothing generated yet


def test_min_tokens_forbids_eos_until_then() -> None:
    logits = [[0.0, 9.0, 1.0]]
    assert sample(logits, sequence((2,), min_tokens=2)).token_ids == [2]
    assert sample(logits, sequence((2, 2), min_tokens=2)).token_ids == [EOS]
    assert sample(logits, sequence((2,), min_tokens=2, ignore_eos=True)).token_ids == [EOS]


def test_logit_bias_and_ids_beyond_the_vocabulary() -> None:
    assert sample([[1.0, 0.0, 0.5]], sequence(logit_bias={2: 1.0})).token_ids == [2]
    assert sample([[1.0, 0.0, 0.5]], sequence(logit_bias={0: -100.0, 300: 100.0})).token_ids == [2]


def test_logprobs_are_read_before_temperature_and_never_infinite() -> None:
    result = sample([[1.0, 5.0, 0.0]], sequence(temperature=0.5, top_k=1, seed=4, min_tokens=3, logprobs=20))
    (entry,) = result.logprobs.values()
    assert entry.token_id == 0
    assert entry.logprob == pytest.approx(-math.log(1 + math.exp(-1.0)), abs=1e-5)
    assert [token_id for token_id, _ in entry.top] == [0, 2, EOS]
    assert entry.top[-1] == (EOS, IMPOSSIBLE_LOGPROB)
    assert sample([[1.0, 5.0]], sequence(logprobs=0)).logprobs[0].top == ()
    assert sample([[1.0, 5.0]], sequence()).logprobs == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not(bad: float, temperature: float) -> None:
    sequences = [sequence(temperature=temperature, logprobs=1, seed=9) for _ in range(3)]
    result = sample([[1.0, 0.0, 2.0], [1.0, bad, 2.0], [1.0, 0.0, 2.0]], *sequences)
    assert result.finite == [True, False, True]
    assert result.token_ids[0] == result.token_ids[2]
    assert sorted(result.logprobs) == [0, 2]


def test_replayed_rows_cost_no_draw() -> None:
    replayed = sequence((2, 2, 2), temperature=1.0, logprobs=1)
    replayed.position = 1
    assert sample([[0.0, 0.0, 1.0]], replayed).logprobs == {}
