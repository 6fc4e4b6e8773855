"""The whole CUDA path, token for token. Run by test_triton.py, through the interpreter or on a card.

What it says must be what the CPU path and transformers say in float32, whoever else is in the batch.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.engine.config import EngineSettings
from serve.engine.gpu.runner import PagedRunner
from serve.engine.loading import load_model, make_runner
from serve.engine.model import T5Model
from serve.engine.runner import ModelRunner
from serve.engine.sampler import Sampled
from serve.engine.scheduler import StepPlan
from serve.output import FinishReason
from serve.sampling_params import SamplingParams
from tests.engine.checkpoints import make_t5_checkpoint
from tests.engine.driving import Results, drain, engine_of, run_alone, same_up_to_near_tie
from tests.engine.gpu.devices import DEVICE, INTERPRETED

CPU = torch.device("cpu")
DIMS = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
PER_TOKEN = 2 * 2 * 16 * 4  # layers x (key, value) x inner x float32
PROCESSORS = (1, 8)  # of 8, a small batch has several for each row, a large one not


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5_checkpoint(tmp_path_factory.mktemp("tiny_t5"), "t5_v1_1", vocab_size=300, dims=DIMS)


@pytest.fixture(scope="module")
def reference(folder: Path) -> T5Model:
    """On the CPU, for the path of the CPU."""
    return load_model(folder, device=CPU, dtype=torch.float32, vocab_limit=290)


@pytest.fixture(scope="module")
def model(folder: Path) -> T5Model:
    return load_model(folder, device=DEVICE, dtype=torch.float32, vocab_limit=290)


class Watched(PagedRunner):
    """Starts with a cache full of NaN, which no step may read, and counts what the steps were."""

    def __init__(self, model: T5Model, settings: EngineSettings, *, processors: int = 1) -> None:
        super().__init__(model, settings, processors=processors)
        self.cache.arena.fill_(math.nan)
        self.sizes: list[int] = []
        self.plain_steps = 0

    def decode(self, plan: StepPlan) -> Tensor:
        self.sizes.append(len(plan.decode))
        return super().decode(plan)

    def sample(self, logits: Tensor, plan: StepPlan) -> Sampled:
        choose = self._steps.choose

        def counted(logits: Tensor) -> Tensor:
            self.plain_steps += 1
            return choose(logits)

        self._steps.choose = counted  # type: ignore[method-assign]
        sampled = super().sample(logits, plan)
        self._steps.choose = choose  # type: ignore[method-assign]
        return sampled


def settings_of(**changes: Any) -> dict[str, Any]:
    return {"cache_bytes": 2000 * PER_TOKEN, "encoder_cache_bytes": 300 * PER_TOKEN, **changes}


def random_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return (*(rng.randrange(2, 290) for _ in range(length - 1)), 1)


def play(
    model: T5Model, requests: list[tuple[int, tuple[int, ...], SamplingParams]], runner: PagedRunner, **settings: Any
) -> tuple[Results, int]:
    """Requests (arrival step, prompt, parameters) to their end; returns what came and the number of preemptions."""
    engine = engine_of(model, runner, **settings)  # type: ignore[arg-type]
    preempt, preemptions = engine.scheduler._preempt, 0

    def counted(item: Any) -> None:
        nonlocal preemptions
        preemptions += 1
        preempt(item)

    engine.scheduler._preempt = counted  # type: ignore[method-assign]
    results, step = Results(), 0
    while engine.has_work or any(arrives >= step for arrives, _, _ in requests):
        for number, (arrives, prompt, params) in enumerate(requests):
            if arrives == step:
                engine.add(str(number), [prompt], params)
        if engine.has_work:
            results.take(engine.step())
        step += 1
    assert engine.scheduler.room.used_bytes == 0
    assert runner.cache.saved_bytes == engine.scheduler.saved.used_bytes
    with torch.inference_mode():
        runner.cache.settle({}, {})
    assert runner.cache.table.free_pages == runner.cache.table.pages
    return results, preemptions


def assert_as_alone(
    reference: T5Model, requests: list[tuple[int, tuple[int, ...], SamplingParams]], results: Results
) -> None:
    """Every sequence is what the CPU path makes of it alone."""
    ties = 0
    for number, (_, prompt, params) in enumerate(requests):
        for index in range(params.n):
            crowd = results.sequences[str(number), index]
            alone, margins = run_alone(reference, prompt, params, index=index)
            assert crowd.error is None
            equal, tie = same_up_to_near_tie(crowd.token_ids, alone.token_ids, margins)
            assert equal, (number, index, crowd.token_ids, alone.token_ids)
            ties += tie
            if not tie:
                assert crowd.finish_reason is alone.finish_reason
                for ours, theirs in zip(crowd.logprobs, alone.logprobs, strict=True):
                    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
                    assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert ties <= 1


@pytest.mark.parametrize("processors", PROCESSORS)
def test_alone_it_is_transformers(model: T5Model, folder: Path, processors: int) -> None:
    from transformers import AutoModelForSeq2SeqLM

    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.suppress_tokens = list(range(290, 300))
    rng = random.Random(0)
    for length, steps in ((1, 3), (100, 20)):
        prompt = random_prompt(rng, length)
        runner = Watched(model, EngineSettings(**settings_of(max_running_sequences=1)), processors=processors)
        params = SamplingParams(max_tokens=steps, ignore_eos=True)
        results, _ = play(model, [(0, prompt, params)], runner, **settings_of(max_running_sequences=1))
        made = theirs.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, eos_token_id=[]
        )[0, 1:].tolist()
        assert results.sequences["0", 0].token_ids == made
        assert len(set(made)) > steps // 4
        assert runner.plain_steps == steps


@pytest.mark.parametrize("processors", PROCESSORS)
def test_in_a_crowd_it_is_itself_alone(model: T5Model, reference: T5Model, processors: int) -> None:
    rng = random.Random(1)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_k": 20, "seed": 5},
        {"temperature": 1.0, "top_p": 0.9, "seed": 6, "n": 3},
        {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "logprobs": 2},
        {"min_tokens": 3, "n": 2, "temperature": 1.2, "seed": 7, "logprobs": 0},
    ]
    requests = []
    for number in range(9):
        params = SamplingParams(max_tokens=rng.randint(2, 10), **kinds[number % len(kinds)])
        requests.append((rng.randrange(8), random_prompt(rng, rng.choice((1, 5, 16, 17, 60, 90))), params))
    requests.append((30, requests[0][1], requests[1][2]))  # a prompt that comes back out of the encoder cache
    settings = settings_of(max_running_sequences=7, encode_tokens_per_step=100)
    runner = Watched(model, EngineSettings(**settings), processors=processors)
    results, preemptions = play(model, requests, runner, **settings)
    assert preemptions == 0
    assert max(runner.sizes) == 7
    assert len(set(runner.sizes)) > 3
    assert sum(step.stats.encoder_cache_hits for step in results.steps if step.stats is not None) >= 1
    assert_as_alone(reference, requests, results)


def test_samples_of_one_prompt_share_its_keys(model: T5Model, reference: T5Model) -> None:
    prompt = random_prompt(random.Random(2), 40)
    requests = [(0, prompt, SamplingParams(max_tokens=12, n=4, temperature=1.0, seed=3, ignore_eos=True))]
    settings = settings_of(max_running_sequences=4)
    runner = Watched(model, EngineSettings(**settings))
    results, _ = play(model, requests, runner, **settings)
    assert sum(step.stats.encode_tokens for step in results.steps if step.stats is not None) == 40
    assert len({tuple(results.sequences["0", index].token_ids) for index in range(4)}) == 4
    assert_as_alone(reference, requests, results)


def test_preempted_it_is_itself_undisturbed(model: T5Model, reference: T5Model) -> None:
    rng = random.Random(3)
    requests = []
    for number in range(6):
        sampling: dict[str, Any] = {"temperature": 0.9, "seed": number} if number % 2 else {}
        params = SamplingParams(max_tokens=rng.randint(17, 20), n=rng.randint(1, 2), ignore_eos=True, **sampling)
        requests.append((rng.randrange(6), random_prompt(rng, rng.choice((3, 20, 40))), params))
    settings = settings_of(cache_bytes=16 * 7 * PER_TOKEN, max_running_sequences=6)
    runner = Watched(model, EngineSettings(**settings))
    assert runner.cache.table.pages == 7
    results, preemptions = play(model, requests, runner, **settings)
    assert preemptions >= 3
    assert_as_alone(reference, requests, results)


def test_scores_are_the_cpu_path_s(model: T5Model, reference: T5Model) -> None:
    candidates = [(5, 1), (6, 7, 8, 1), tuple(range(20, 90)), (9, 1), (1,), (295, 1)]
    prompt = random_prompt(random.Random(4), 50)
    scores = []
    for each, runner in (
        (model, PagedRunner(model, EngineSettings(**settings_of()))),
        (reference, ModelRunner(reference, cache_bytes=2000 * PER_TOKEN)),
    ):
        engine = engine_of(each, runner, **settings_of())  # type: ignore[arg-type]
        engine.add_score("s", prompt, candidates)
        scores.append(drain(engine).scores["s"])
    assert scores[0].error is None
    for (ours, ours_length), (theirs, theirs_length) in zip(*(result.scores for result in scores), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert ours_length == theirs_length


def test_who_is_aborted_leaves_room_and_no_trace(model: T5Model, reference: T5Model) -> None:
    settings = settings_of(cache_bytes=16 * 4 * PER_TOKEN, max_running_sequences=2)
    runner = Watched(model, EngineSettings(**settings))
    engine = engine_of(model, runner, **settings)  # type: ignore[arg-type]
    rng, params = random.Random(8), SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = {name: random_prompt(rng, 12) for name in ("stays", "goes", "waits")}
    for name, prompt in prompts.items():
        engine.add(name, [prompt], params)
    results = Results()
    results.take(engine.step())
    results.take(engine.step())
    engine.abort("goes")
    drain(engine, results)
    assert len(results.sequences["goes", 0].token_ids) == 2
    for name in ("stays", "waits"):
        alone, _ = run_alone(reference, prompts[name], params)
        assert results.sequences[name, 0].token_ids == alone.token_ids
    with torch.inference_mode():
        runner.cache.settle({}, {})
    assert runner.cache.table.free_pages == 4


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of the broken row
def test_a_row_that_is_not_finite_ends_alone(model: T5Model, reference: T5Model) -> None:
    """What it leaves behind in its pages is not seen by those who get them."""
    settings = settings_of(cache_bytes=16 * 8 * PER_TOKEN, max_running_sequences=2)
    runner = Watched(model, EngineSettings(**settings))
    engine = engine_of(model, runner, **settings)  # type: ignore[arg-type]
    good, bad = random_prompt(random.Random(5), 20), random_prompt(random.Random(6), 20)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add("good", [good], params)
    engine.add("bad", [bad], params)
    results = Results()
    results.take(engine.step())
    broken = engine._sequences["bad"][0]
    assert broken.slot is not None
    pages = runner.cache.table.of("self", (broken.slot.capacity, broken.slot.row))
    with torch.inference_mode():
        runner.cache.arena[:, pages.tolist(), :, :, 0] = math.nan
    results.take(engine.step())
    assert results.sequences["bad", 0].finish_reason is FinishReason.ERROR
    engine.add("later", [bad], params)
    drain(engine, results)
    for request_id, prompt in (("good", good), ("later", bad)):
        alone, _ = run_alone(reference, prompt, params)
        assert results.sequences[request_id, 0].token_ids == alone.token_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_says_nearly_the_same(folder: Path, model: T5Model, dtype: torch.dtype) -> None:
    """The first step's logits; later ones follow other tokens where the two best are close."""
    half = load_model(folder, device=DEVICE, dtype=dtype, vocab_limit=290)
    prompt = random_prompt(random.Random(7), 60)
    logits = []
    for each in (half, model):
        seen: list[Tensor] = []

        class Recording(PagedRunner):
            def sample(self, logits: Tensor, plan: StepPlan, seen: list[Tensor] = seen) -> Sampled:
                seen.append(logits.clone())
                return super().sample(logits, plan)

        engine = engine_of(each, Recording(each, EngineSettings(**settings_of())), **settings_of())  # type: ignore[arg-type]
        engine.add("r", [prompt], SamplingParams(max_tokens=2, ignore_eos=True))
        drain(engine)
        assert seen[0].dtype is torch.float32
        logits.append(seen[0])
    spread = float(logits[1].std())
    assert float((logits[0] - logits[1]).abs().max()) < (0.1 if dtype is torch.bfloat16 else 0.02) * spread


def test_the_device_chooses_the_path_and_a_test_may(model: T5Model, reference: T5Model) -> None:
    settings = EngineSettings(**settings_of())
    assert isinstance(make_runner(reference, settings), ModelRunner)
    assert isinstance(make_runner(model, settings, paged=True), PagedRunner)
    assert isinstance(make_runner(model, settings), ModelRunner if INTERPRETED else PagedRunner)
