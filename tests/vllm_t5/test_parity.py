"""T5 on real vLLM writes the tokens of transformers in float32, every one; and the tests would see if it did not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_t5.conftest import TOKENS
from tests.vllm_t5.models import SPARE, Reference, random_prompts, reference, small, text_of
from tests.vllm_t5.processes import Driver

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

Prompts = list[list[int]]


def load(
    prompts: Prompts, expected: Reference, count: int, seed: int, shortest: int = 1
) -> tuple[list[Any], list[Any]]:
    """`count` requests over `prompts` of random lengths, and what each must write."""
    source = random.Random(seed)
    picks = [(source.randrange(len(prompts)), source.randint(shortest, TOKENS)) for _ in range(count)]
    return [(prompts[n], tokens) for n, tokens in picks], [expected.tokens[n][:tokens] for n, tokens in picks]


def test_the_checkpoint_is_not_chaotic(small_t5: Path, prompts: Prompts, expected: Reference) -> None:
    """float64 writes the same: what differs on vLLM is vLLM's. And the texts are texts, not one token repeated."""
    exact = reference(small_t5, prompts[4:14:3], 110, torch.float64)
    assert exact.tokens == [tokens[:110] for tokens in expected.tokens[4:14:3]]
    assert min(len(set(tokens)) for tokens in expected.tokens) > TOKENS // 3
    assert min(map(min, expected.margins)) > 5e-5


def test_mixed_lengths_in_one_batch(driver: Driver, prompts: Prompts, expected: Reference) -> None:
    answer = driver.ask("generate", prompts=prompts, params={"max_tokens": 48})
    assert [choices[0] for choices in answer["tokens"]] == [tokens[:48] for tokens in expected.tokens]
    assert answer["encoder_ids"] == prompts
    assert answer["decoder_ids"] == [[0]] * len(prompts)


def test_every_form_of_a_prompt(driver: Driver, prompts: Prompts, expected: Reference) -> None:
    some, params = prompts[:4], {"max_tokens": 12}
    want = [tokens[:12] for tokens in expected.tokens[:4]]
    texts = [text_of(prompt) for prompt in some]
    assert [c[0] for c in driver.ask("generate", prompts=some, texts=texts, params=params)["tokens"]] == want
    explicit = driver.ask("generate", prompts=some, decoder=None, params=params)
    assert [c[0] for c in explicit["tokens"]] == want
    as_text = driver.ask("generate", prompts=some, texts=texts, decoder={"prompt_token_ids": [0]}, params=params)
    assert [c[0] for c in as_text["tokens"]] == want


def test_a_forced_decoder_prefix_goes_on_as_if_written(driver: Driver, prompts: Prompts, expected: Reference) -> None:
    """By ids and by text (whose </s> is not part of it); `prompt_logprobs` score it as generation did."""
    prefix, params = expected.tokens[5][:7], {"max_tokens": 20, "prompt_logprobs": 1}
    forced = driver.ask("generate", prompts=[prompts[5]], decoder={"prompt_token_ids": prefix}, params=params)
    assert forced["tokens"][0][0] == expected.tokens[5][7:27]
    assert forced["decoder_ids"][0] == [0, *prefix]
    free = driver.ask("generate", prompts=[prompts[5]], params={"max_tokens": 7, "logprobs": 1})
    for token, scored, written in zip(prefix, forced["prompt_logprobs"][0][1:], free["logprobs"][0], strict=True):
        assert scored[str(token)] == pytest.approx(written[str(token)], abs=1e-3)
    words = " ".join(f"w{token}" for token in prefix)
    by_text = driver.ask("generate", prompts=[prompts[5]], decoder=words, params=params)
    assert by_text["tokens"] == forced["tokens"]


def test_staggered_arrivals_with_few_slots(driver: Driver, prompts: Prompts, expected: Reference) -> None:
    requests, want = load(prompts, expected, count=40, seed=1)
    answer = driver.crowd(requests, slots=5, arrival=0.3, seed=1)
    assert answer["together"] == 5
    assert answer["tokens"] == want


def test_preempted_requests_lose_nothing(driver: Driver, prompts: Prompts, expected: Reference) -> None:
    requests, want = load(prompts, expected, count=48, seed=2, shortest=100)
    answer = driver.crowd(requests, arrival=1.0)
    assert answer["tokens"] == want
    assert answer["preemptions"] >= 20


def test_without_the_order_of_encoder_outputs_requests_get_each_others_text(
    driver: Driver, prompts: Prompts, expected: Reference
) -> None:
    """The same load on vLLM's runner as it is: the guard that the plugin's order is still needed, and tested."""
    requests, want = load(prompts, expected, count=48, seed=2, shortest=100)
    answer = driver.crowd(requests, arrival=1.0, ordered=False)
    assert answer["preemptions"] >= 20
    assert answer["tokens"] != want


@pytest.mark.parametrize(("beyond", "first"), [(0, 0), (96, 97)])
def test_a_wrong_bias_is_seen(driver: Driver, prompts: Prompts, expected: Reference, beyond: int, first: int) -> None:
    """The bias zeroed from a distance on: every text differs, and not before that distance can occur."""
    requests = [(prompt, TOKENS) for prompt in prompts[:8]]
    written = driver.crowd(requests, arrival=1.0, ablate=beyond)["tokens"]
    for ours, theirs in zip(written, expected.tokens, strict=False):
        assert ours != theirs
        assert next(n for n in range(TOKENS) if ours[n] != theirs[n]) >= first - 1


def test_spare_rows_of_the_vocabulary_are_never_seen(driver: Driver, prompts: Prompts) -> None:
    """Not sampled at any temperature, and not among the logprobs of the whole vocabulary's best."""
    params = {"max_tokens": 20, "temperature": 2.0, "seed": 5, "logprobs": 20, "n": 4}
    answer = driver.ask("generate", prompts=prompts[:3], params=params)
    assert max(token for choices in answer["tokens"] for choice in choices for token in choice) < 32128 - SPARE
    assert max(int(t) for steps in answer["logprobs"] for step in steps for t in step) < 32128 - SPARE


def test_bad_prompts_are_refused_and_harm_nobody(driver: Driver, prompts: Prompts, expected: Reference) -> None:
    for bad in ([3, 99_999, 1], [], [3, -1], [5] * 400):
        with pytest.raises(RuntimeError, match="Error"):
            driver.ask("generate", prompts=[bad], params={"max_tokens": 4})
    answer = driver.ask("generate", prompts=prompts[:1], params={"max_tokens": 4})
    assert answer["tokens"][0][0] == expected.tokens[0][:4]


def test_output_may_be_as_long_as_the_model_allows(driver: Driver, prompts: Prompts, expected: Reference) -> None:
    """201 tokens of encoder input take nothing from the decoder's room."""
    answer = driver.ask("generate", prompts=prompts[-1:], params={"max_tokens": 300})
    assert len(answer["tokens"][0][0]) == 300
    assert answer["tokens"][0][0][:TOKENS] == expected.tokens[-1]


@pytest.mark.parametrize(("kind", "eager"), [("mt5", False), ("t5", True)])
def test_the_other_families(kind: str, eager: bool, tmp_path: Path) -> None:
    """mT5 with torch.compile on; T5 1.0: ReLU, tied and scaled head. Crowded, with preemptions."""
    folder = small(tmp_path / "model", kind)  # type: ignore[arg-type]
    prompts = random_prompts([5, 9, 20, 33, 60, 90], size=1024 - SPARE, seed=4)
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "block_size": 32, "num_gpu_blocks_override": 24}
    driver = Driver(folder, tmp_path / "log", max_model_len=160, enforce_eager=eager, **options)
    try:
        expected = reference(folder, prompts, TOKENS)
        assert min(len(set(tokens)) for tokens in expected.tokens) > 10
        assert min(map(min, expected.margins)) > 2e-5
        requests, want = load(prompts, expected, count=24, seed=3, shortest=60)
        answer = driver.crowd(requests, arrival=0.9)
        assert answer["tokens"] == want
        assert answer["preemptions"] >= 5
        assert (answer["compiled"] > 0) is not eager
    finally:
        driver.close()
