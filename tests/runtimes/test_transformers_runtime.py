"""Decoder-only checkpoints under our own engine: what is computed, and what is refused (more: tests/contract)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serve.engine.scheduler import Scheduler
from serve.errors import CheckpointError, EngineFailure
from serve.output import FinishReason
from serve.request import Mode, PreparedPrompt, PreparedRequest, PreparedScore
from serve.runtimes.causal_attention import attend
from serve.runtimes.transformers_runtime import TransformersRuntime
from serve.sampling_params import SamplingParams
from tests.contract.causal_checkpoints import make_causal_checkpoint

FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text", "gpt2")


@asynccontextmanager
async def started(folder: Path, **options: Any) -> AsyncIterator[TransformersRuntime]:
    runtime = TransformersRuntime(folder, device="cpu", dtype="float32", **options)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.stop()


def request(prompt: list[int], **sampling: Any) -> PreparedRequest:
    params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **sampling})
    return PreparedRequest("r", Mode.RAW, (PreparedPrompt(tuple(prompt)),), params)


async def texts(runtime: TransformersRuntime, asked: PreparedRequest) -> list[list[int]]:
    made: dict[int, list[int]] = {}
    async for delta in runtime.generate(asked):
        assert delta.finish_reason is not FinishReason.ERROR, delta.error
        made.setdefault(delta.index, []).extend(delta.token_ids)
    return [made[index] for index in sorted(made)]


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    made: list[int] = output[0, len(prompt) :].tolist()
    return made


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 380, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_crowd_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    """Prompts shorter and longer than a sliding window of 6, alone, shared by three and by six sequences."""
    folder = make_causal_checkpoint(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = random_prompts(1, 2, 5, 17, 33)
    async with started(folder) as runtime:
        asked = [request(prompt, n=n) for prompt, n in zip(prompts, (6, 1, 3, 1, 1), strict=True)]
        crowd = await asyncio.gather(*(texts(runtime, one) for one in asked))
    for prompt, made in zip(prompts, crowd, strict=True):
        expected = greedy(model, prompt, 24)
        assert len(set(expected)) > 5, "the model says too little to tell anything"
        assert all(text == expected for text in made)


async def test_staggered_arrivals_few_slots_and_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests join and leave at any step, wait for slots, and are preempted when the cache is full."""
    folder = make_causal_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = random_prompts(*(3 + 5 * number % 29 for number in range(16)))
    preempted = []
    preempt = Scheduler._preempt

    def noted(self: Scheduler, item: Any) -> None:
        preempted.append(item)
        preempt(self, item)

    monkeypatch.setattr(Scheduler, "_preempt", noted)
    async with started(folder, max_running_sequences=5, cache_bytes=140_000) as runtime:

        async def later(number: int) -> list[int]:
            await asyncio.sleep(0.01 * (number % 7))
            return (await texts(runtime, request(prompts[number], max_tokens=10 + number * 3)))[0]

        made = await asyncio.gather(*(later(number) for number in range(16)))
    assert len(preempted) >= 3
    assert made == [greedy(model, prompt, 10 + number * 3) for number, prompt in enumerate(prompts)]


async def test_scores_are_transformers_log_probabilities(tmp_path: Path) -> None:
    folder = make_causal_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, *candidates = random_prompts(9, 1, 4, 30)
    prepared = PreparedScore("s", PreparedPrompt(tuple(prompt)), ("a", "b", "c"), tuple(map(tuple, candidates)))
    async with started(folder) as runtime:
        scores = await runtime.score(prepared)
        single = await runtime.score(PreparedScore("s", PreparedPrompt((7,)), ("a",), ((9, 4),)))
    for candidate, (logprob, count) in zip(candidates, scores, strict=True):
        assert count == len(candidate)
        assert logprob == pytest.approx(continuation(model, prompt, candidate), abs=1e-3)
    assert single[0][0] == pytest.approx(continuation(model, [7], [9, 4]), abs=1e-3)


def continuation(model: Any, prompt: list[int], candidate: list[int]) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + candidate])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(candidate) - 1)
    return sum(float(logprobs[place, token_id]) for place, token_id in zip(places, candidate, strict=True))


async def test_prompt_logprobs(tmp_path: Path) -> None:
    folder = make_causal_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (prompt,) = random_prompts(90)
    async with started(folder) as runtime:
        entries = await runtime.prompt_logprobs("e", tuple(prompt), 3)
        assert await runtime.prompt_logprobs("e", (5,), 3) == ()
        async with asyncio.timeout(10):
            while runtime._runner.details or runtime._runner.wanted:  # the engine thread forgets them in its own time
                await asyncio.sleep(0.005)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in entries] == prompt[1:]
    for place, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(logprobs[place, entry.token_id]), abs=1e-3)
        best = logprobs[place].topk(3)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)


async def test_any_of_several_eos_tokens_ends_a_sequence(tmp_path: Path) -> None:
    plain = make_causal_checkpoint(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    (prompt,) = random_prompts(8)
    said = greedy(model, prompt, 12)
    second = said[5]
    folder = make_causal_checkpoint(tmp_path / "two", eos=[1, second])
    async with started(folder) as runtime:
        (made,) = await texts(runtime, request(prompt, ignore_eos=False))
        assert made == said[: said.index(second) + 1]
        (held,) = await texts(runtime, request(prompt, ignore_eos=False, min_tokens=9, max_tokens=9))
        assert second not in held
        (ignored,) = await texts(runtime, request(prompt, max_tokens=12))
        assert ignored == said


async def test_a_full_context_ends_a_sequence(tmp_path: Path) -> None:
    folder = make_causal_checkpoint(tmp_path, max_position_embeddings=32)
    async with started(folder) as runtime:
        (made,) = await texts(runtime, request([5] * 20, max_tokens=100))
        assert len(made) == 12
        stream = runtime.generate(request([5] * 32))
        delta = await anext(stream)
        assert delta.finish_reason is FinishReason.ERROR
        assert "context has 32" in (delta.error or "")
        with pytest.raises(EngineFailure, match="context"):
            await runtime.score(PreparedScore("s", PreparedPrompt((5,) * 40), ("a",), ((9,),)))


async def test_ids_beyond_the_tokenizer_are_never_made(tmp_path: Path) -> None:
    folder = make_causal_checkpoint(tmp_path)
    async with started(folder, vocab_limit=20) as runtime:
        made = await texts(runtime, request([5, 6], temperature=2.0, seed=1, n=4, logprobs=5, max_tokens=50))
    assert max(max(text) for text in made) < 20


async def test_info(tmp_path: Path) -> None:
    async with started(make_causal_checkpoint(tmp_path)) as runtime:
        info = runtime.info
    assert (info.runtime, info.architecture) == ("transformers", "LlamaForCausalLM")
    assert not info.is_encoder_decoder


@pytest.mark.parametrize(
    ("family", "words"), [("gemma2", "softcap"), ("mamba", "more than keys and values"), ("gpt2", None)]
)
async def test_an_architecture_that_would_be_wrong_is_refused(
    family: str, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_causal_checkpoint(tmp_path, family)
    if words is None:  # an attention that we compute otherwise than the model means, which only numbers show
        words = "logits would be"

        def narrow(*arguments: Any, **options: Any) -> Any:
            return attend(*arguments, **{**options, "scaling": options["scaling"] * 2})

        monkeypatch.setattr("serve.runtimes.causal_model.attend", narrow)
    with pytest.raises(CheckpointError, match=words):
        async with started(folder):
            pass


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
async def test_a_tensor_too_few_or_too_many_stops_the_start(damage: str, tmp_path: Path) -> None:
    folder = make_causal_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    else:
        name = "model.layers.7.mlp.up_proj.weight"
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        async with started(folder):
            pass


async def test_pickled_weights_and_a_missing_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        async with started(tmp_path):
            pass
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="safetensors"):
        async with started(tmp_path):
            pass
