"""vLLM behind the protocol: what needs no engine, and an engine that is killed. The rest is in tests/contract."""

from __future__ import annotations

import asyncio
import doctest
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve.errors import CheckpointError, EngineFailure
from serve.output import IMPOSSIBLE_LOGPROB, FinishReason
from serve.request import Mode, PreparedPrompt, PreparedRequest, PreparedScore
from serve.runtimes import runtime_args
from serve.runtimes.runtime_args import parse_runtime_args
from serve.sampling_params import SamplingParams
from tests.contract.causal_checkpoints import make_causal_checkpoint
from tests.runtimes.processes import children, name_of

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
vllm_tests = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore"), needs_vllm]


def in_vllm(test: Any) -> Any:
    for mark in vllm_tests:
        test = mark(test)
    return test


def test_the_examples_of_runtime_args() -> None:
    assert doctest.testmod(runtime_args).failed == 0


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("tensor_parallel_size", "key=value"),
        ("tensor_parallel_size=0", "at least 1"),
        ("tensor_parallel_size=two", "at least 1, not 'two'"),
        ("gpu_memory_utilization=1.5", r"\(0, 1\]"),
        ("gpu_memory_utilization=nan", r"\(0, 1\]"),
        ("enforce_eager=maybe", "true or false"),
        ("quantization=", "not be empty"),
        ("tensor_paralel_size=2", "did you mean tensor_parallel_size"),
        ("seed=1", "no such argument"),
    ],
)
def test_a_wrong_runtime_arg_is_named(item: str, words: str) -> None:
    values, [problem] = parse_runtime_args([item])
    assert values == {}
    with pytest.raises(ValueError, match=words):
        raise ValueError(problem)


def test_all_wrong_runtime_args_are_told_at_once() -> None:
    values, problems = parse_runtime_args(["max_model_len=512", "max-model-len=256", "x=1", "enforce_eager=2"])
    assert values == {"max_model_len": 512}
    assert len(problems) == 3


@in_vllm
def test_sampling_params_in_vllms_words() -> None:
    from serve.runtimes.vllm_logits import PENALTY
    from serve.runtimes.vllm_requests import sample_seed, to_sampling_params

    asked = SamplingParams(max_tokens=9, min_tokens=3, seed=7, n=4, repetition_penalty=1.5, logit_bias={5: 2.0})
    params = to_sampling_params(asked, 2, (1, 9))
    assert (params.n, params.max_tokens, params.min_tokens, params.detokenize) == (1, 9, 3, False)
    assert params.stop_token_ids == [1, 9]
    assert params.repetition_penalty == 1.0, "vLLM's own counts the prompt's tokens"
    assert params.extra_args == {PENALTY: 1.5}
    assert params.seed == sample_seed(7, 2)
    assert sample_seed(7, 0) == 7
    assert sample_seed(-1, 0) != -1, "vLLM takes -1 for no seed"
    assert len({sample_seed(seed, sample) for seed in range(20) for sample in range(20)}) == 400
    open_end = to_sampling_params(SamplingParams(max_tokens=9, min_tokens=3, ignore_eos=True), 0, (1, 9))
    assert (open_end.ignore_eos, open_end.min_tokens, open_end.stop_token_ids) == (True, 0, [])


@in_vllm
def test_deltas_from_vllms_outputs() -> None:
    from serve.runtimes.vllm_requests import to_delta

    entries = {
        7: SimpleNamespace(rank=4, logprob=float("-inf")),
        5: SimpleNamespace(rank=1, logprob=-0.1),
        400: SimpleNamespace(rank=2, logprob=-3.0),
        6: SimpleNamespace(rank=3, logprob=-4.0),
    }
    made = SimpleNamespace(token_ids=[7], logprobs=[entries], finish_reason="stop", stop_reason=1)
    delta = to_delta(3, SimpleNamespace(outputs=[made]), 3, vocab_limit=400)
    assert (delta.index, delta.token_ids, delta.finish_reason) == (3, (7,), FinishReason.STOP)
    [entry] = delta.logprobs
    assert entry.logprob == IMPOSSIBLE_LOGPROB
    assert entry.top == ((5, -0.1), (6, -4.0))
    failed = SimpleNamespace(token_ids=[], logprobs=None, finish_reason="error", stop_reason="bad block")
    ended = to_delta(0, SimpleNamespace(outputs=[failed]), None, None)
    assert ended.finish_reason is FinishReason.ERROR
    assert "bad block" in (ended.error or "")


@in_vllm
def test_engine_arguments(tmp_path: Path) -> None:
    from serve.runtimes.vllm_engine import EngineSettings, ModelFacts, engine_arguments

    def arguments(*, is_encoder_decoder: bool = False, **given: Any) -> dict[str, Any]:
        facts = ModelFacts(is_encoder_decoder=is_encoder_decoder, context_length=4096, vocab_size=10)
        return engine_arguments(
            EngineSettings(tmp_path, facts, "cpu", "float32", 8, 512, 2560, 384, False, arguments=given)
        )

    plain = arguments()
    assert (plain["max_model_len"], plain["max_num_seqs"], plain["max_num_batched_tokens"]) == (2560, 8, 512)
    assert plain["load_format"] == "safetensors"
    assert plain["skip_tokenizer_init"]
    assert plain["seed"] != arguments()["seed"]
    given = arguments(max_model_len=100, max_num_batched_tokens=64, enforce_eager=True)
    assert (given["max_model_len"], given["max_num_batched_tokens"], given["enforce_eager"]) == (100, 64, True)
    assert arguments(is_encoder_decoder=True)["max_num_batched_tokens"] == 2560, "an encoder's input is never cut"


@in_vllm
def test_the_penalty_moves_with_its_row() -> None:
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

    from serve.runtimes.vllm_logits import PENALTY, VOCAB_LIMIT, OutputPenalty
    from serve.runtimes.vllm_requests import to_sampling_params

    config: Any = SimpleNamespace(additional_config={VOCAB_LIMIT: 6})
    processor = OutputPenalty(config, torch.device("cpu"), False)
    made = [1, 2, 2, -1]
    asked = to_sampling_params(SamplingParams(max_tokens=9, repetition_penalty=2.0, logit_bias={2: 10.0}), 0, ())
    assert asked.extra_args == {PENALTY: 2.0}
    plain = to_sampling_params(SamplingParams(max_tokens=9), 0, ())

    def update(**changes: Any) -> None:
        processor.update_state(BatchUpdate(2, **{"removed": [], "added": [], "moved": [], **changes}))

    def row(number: int) -> list[float]:
        logits = torch.tensor([[1.0, 4.0, 8.0, -2.0, 3.0, 5.0, 99.0]] * 2)
        logits[:, 2] += 10.0  # vLLM's own bias has been there before
        values: list[float] = processor.apply(logits)[number].tolist()
        return values

    update(added=[(0, asked, [3], made), (1, plain, [3], [])])
    assert row(0) == [1.0, 2.0, 14.0, -2.0, 3.0, 5.0, float("-inf")]
    assert row(1)[:6] == [1.0, 4.0, 18.0, -2.0, 3.0, 5.0]
    made[3:] = [3]
    assert row(0)[3] == -4.0
    update(moved=[(0, 1, MoveDirectionality.SWAP)])
    assert (row(0)[1], row(1)[1]) == (4.0, 2.0)
    update(moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert row(0)[1] == 2.0
    update(removed=[0])
    assert row(0)[1] == 4.0


@in_vllm
async def test_a_checkpoint_that_vllm_cannot_serve(tmp_path: Path) -> None:
    from serve.runtimes.vllm_runtime import VllmRuntime

    runtime = VllmRuntime(tmp_path, device="cpu", dtype="float32")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        await runtime.start()
    assert runtime.health() == "the engine is not running"
    with pytest.raises(CheckpointError, match="int8"):
        VllmRuntime(tmp_path, device="cpu", dtype="int8")
    await runtime.stop()


@in_vllm
async def test_a_killed_engine_fails_every_waiter_at_once(tmp_path: Path) -> None:
    from serve.runtimes.vllm_runtime import VllmRuntime

    folder = make_causal_checkpoint(tmp_path, hidden_size=128)
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_model_len": 512}
    runtime = VllmRuntime(folder, device="cpu", dtype="float32", runtime_args=arguments)
    before = children(os.getpid())
    await runtime.start()
    try:
        engines = [pid for pid in children(os.getpid()) - before if "EngineCore" in name_of(pid)]
        assert len(engines) == 1
        streams = [runtime.generate(long_request()) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        prepared = PreparedScore("s", PreparedPrompt((5,) * 100), ("x",) * 40, ((6,) * 300,) * 40)
        score = asyncio.ensure_future(runtime.score(prepared))
        await asyncio.sleep(0.05)
        os.kill(engines[0], signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            with pytest.raises(EngineFailure, match="died"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineFailure):
            await score
        assert time.monotonic() - killed < 10
        assert "died" in (runtime.health() or "")
        with pytest.raises(EngineFailure):
            await anext(runtime.generate(long_request()))
    finally:
        await runtime.stop()


def long_request() -> PreparedRequest:
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    return PreparedRequest("r", Mode.RAW, (PreparedPrompt((5, 6, 7)),), params)
