"""The runtime around the engine: streams, cancelling, failure, stopping - with a real (tiny) model."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.engine.config import EngineSettings
from serve.engine.model import T5Model
from serve.engine.native.library import Level, level
from serve.engine.packed_linear import fbgemm_available
from serve.engine.runner import ModelRunner, Runner
from serve.engine.scheduler import StepPlan
from serve.errors import CheckpointError, EngineFailure
from serve.output import FinishReason, TokenDelta
from serve.request import Mode, PreparedPrompt, PreparedRequest, PreparedScore
from serve.runtimes.base import Runtime, StepStats, TokenStream
from serve.runtimes.torch_runtime import TorchRuntime, resolve_format
from serve.sampling_params import SamplingParams
from tests.engine.checkpoints import make_t5_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5_checkpoint(tmp_path_factory.mktemp("model"))


class Gate(ModelRunner):
    """Lets decode steps pass only while it is open, and breaks when told to."""

    def __init__(self, model: T5Model, *, cache_bytes: int) -> None:
        super().__init__(model, cache_bytes=cache_bytes)
        self.open = threading.Event()
        self.open.set()
        self.broken = False
        self.steps = 0

    def decode(self, plan: StepPlan) -> Any:
        self.open.wait()
        if self.broken:
            raise RuntimeError("the device is gone")
        self.steps += 1
        return super().decode(plan)


class GatedRuntime(TorchRuntime):
    gate: Gate

    def make_runner(self, model: T5Model, settings: EngineSettings) -> Runner[Any]:
        self.gate = Gate(model, cache_bytes=settings.cache_bytes)
        return self.gate


@asynccontextmanager
async def started(folder: Path, **options: object) -> AsyncIterator[tuple[GatedRuntime, list[StepStats]]]:
    stats: list[StepStats] = []
    runtime = GatedRuntime(folder, device="cpu", dtype="float32", on_step=stats.append, **options)  # type: ignore[arg-type]
    await runtime.start()
    try:
        yield runtime, stats
    finally:
        if hasattr(runtime, "gate"):
            runtime.gate.open.set()
        await runtime.stop()


def request(name: str = "r", *, prompts: int = 1, **sampling: object) -> PreparedRequest:
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    texts = tuple(PreparedPrompt((5 + number, 6, 7, 1)) for number in range(prompts))
    return PreparedRequest(name, Mode.RAW, texts, params)


async def collect(stream: TokenStream) -> dict[int, list[TokenDelta]]:
    deltas: dict[int, list[TokenDelta]] = {}
    async for delta in stream:
        deltas.setdefault(delta.index, []).append(delta)
    return deltas


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_request_begins_with_the_step_that_takes_it_in(folder: Path) -> None:
    """Not with that step's end: what the step takes is no time in the queue."""
    async with started(folder) as (runtime, _):
        runtime.gate.open.clear()
        asked = time.monotonic()
        stream = runtime.generate(request())
        await asyncio.sleep(0.3)
        runtime.gate.open.set()
        began = await stream.started()
        assert asked <= began < asked + 0.25
        assert time.monotonic() >= asked + 0.3
        await collect(stream)


async def test_streams_every_sequence_to_its_end(folder: Path) -> None:
    async with started(folder) as (runtime, stats):
        _protocol: Runtime = runtime
        assert runtime.health() is None
        stream = runtime.generate(request(prompts=2, n=3))
        await stream.started()
        deltas = await collect(stream)
        assert sorted(deltas) == list(range(6))
        for parts in deltas.values():
            assert sum(len(part.token_ids) for part in parts) == 8
            assert [part.finish_reason for part in parts][-1] is FinishReason.LENGTH
        await until(lambda: bool(stats) and stats[-1].sequences_running == 0)
        assert stats[0].encode_tokens == 8
        assert stats[0].encode_seconds > 0
        assert stats[0].decode_seconds > 0
        assert stats[-1].cache_usage == (("self", 0.0), ("cross", 0.0))


async def test_one_request_id_may_be_used_twice_at_once(folder: Path) -> None:
    async with started(folder) as (runtime, _):
        one, two = await asyncio.gather(*(collect(runtime.generate(request("same"))) for _ in range(2)))
        texts = [[token for delta in deltas[0] for token in delta.token_ids] for deltas in (one, two)]
        assert len(texts[0]) == 8
        assert texts[0] == texts[1]


async def test_a_slow_consumer_finds_one_joined_delta(folder: Path) -> None:
    async with started(folder) as (runtime, stats):
        stream = runtime.generate(request(logprobs=1))
        await until(lambda: bool(stats) and stats[-1].sequences_running == 0)
        (delta,) = (await collect(stream))[0]
        assert len(delta.token_ids) == len(delta.logprobs) == 8


@pytest.mark.parametrize("how", ["aclose", "collected"])
async def test_a_client_that_leaves_frees_its_room_before_the_next_step(folder: Path, how: str) -> None:
    async with started(folder) as (runtime, stats):
        stream = runtime.generate(request(max_tokens=400))
        await anext(stream)
        runtime.gate.open.clear()
        if how == "aclose":
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        else:
            del stream
            gc.collect()
        steps = runtime.gate.steps
        runtime.gate.open.set()
        await until(lambda: stats[-1].sequences_running == 0)
        assert runtime.gate.steps <= steps + 1  # the one that was in progress
        assert stats[-1].cache_usage == (("self", 0.0), ("cross", 0.0))


async def test_finishing_one_sequence_leaves_the_others(folder: Path) -> None:
    async with started(folder) as (runtime, stats):
        stream = runtime.generate(request(n=2, max_tokens=50, temperature=1.0, seed=1))
        await anext(stream)
        stream.finish(0)
        deltas = await collect(stream)
        assert 0 not in deltas
        assert deltas[1][-1].finish_reason is FinishReason.LENGTH
        await until(lambda: stats[-1].sequences_running == 0)


async def test_finishing_all_sequences_ends_the_stream(folder: Path) -> None:
    async with started(folder) as (runtime, stats):
        stream = runtime.generate(request(max_tokens=400))
        await anext(stream)
        stream.finish(0)
        assert await collect(stream) == {}
        await until(lambda: stats[-1].sequences_running == 0)


async def test_a_request_that_waits_can_be_closed(folder: Path) -> None:
    async with started(folder, max_running_sequences=1) as (runtime, stats):
        first = runtime.generate(request(max_tokens=60))
        second = runtime.generate(request())
        await anext(first)
        await second.aclose()
        await collect(first)
        await until(lambda: stats[-1].sequences_running == 0)
        assert sum(1 for step in stats if step.encode_tokens) == 1


async def test_a_bad_prompt_ends_with_an_error_delta(folder: Path) -> None:
    async with started(folder) as (runtime, _):
        bad = PreparedRequest("bad", Mode.RAW, (PreparedPrompt((10**6,)),), SamplingParams(max_tokens=4))
        stream = runtime.generate(bad)
        await stream.started()
        (delta,) = (await collect(stream))[0]
        assert delta.finish_reason is FinishReason.ERROR
        assert "token id" in (delta.error or "")
        assert len((await collect(runtime.generate(request())))[0]) > 0


async def test_scores(folder: Path) -> None:
    async with started(folder) as (runtime, _):
        prepared = PreparedScore("s", PreparedPrompt((5, 6, 1)), ("a", "b"), ((9, 1), (10, 11, 1)))
        (first, second) = await runtime.score(prepared)
        assert first[1] == 2
        assert second[1] == 3
        assert first[0] < 0
        bad = PreparedScore("s", PreparedPrompt(()), ("a",), ((9, 1),))
        with pytest.raises(EngineFailure, match="no tokens"):
            await runtime.score(bad)


async def test_a_cancelled_score_frees_its_room(folder: Path) -> None:
    async with started(folder, max_running_sequences=1) as (runtime, stats):
        running = runtime.generate(request(max_tokens=300))
        await anext(running)
        prepared = PreparedScore("s", PreparedPrompt((5, 6, 1)), ("a",), ((9, 1),))
        task = asyncio.ensure_future(runtime.score(prepared))
        await until(lambda: stats[-1].requests_waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: stats[-1].requests_waiting == 0)
        await running.aclose()


async def test_a_dead_engine_fails_every_waiter_and_everybody_after(folder: Path) -> None:
    async with started(folder, max_running_sequences=1) as (runtime, _):
        running, waiting = runtime.generate(request(max_tokens=300)), runtime.generate(request())
        score = asyncio.ensure_future(runtime.score(PreparedScore("s", PreparedPrompt((5, 1)), ("a",), ((9, 1),))))
        await anext(running)
        runtime.gate.broken = True
        with pytest.raises(EngineFailure, match="the device is gone"):
            await collect(running)
        with pytest.raises(EngineFailure):
            await waiting.started()
        with pytest.raises(EngineFailure):
            await score
        assert "the device is gone" in (runtime.health() or "")
        with pytest.raises(EngineFailure):
            await anext(runtime.generate(request()))
        with pytest.raises(EngineFailure):
            await runtime.score(PreparedScore("s", PreparedPrompt((5, 1)), ("a",), ((9, 1),)))


async def test_stop_fails_waiters_and_is_idempotent(folder: Path) -> None:
    async with started(folder) as (runtime, _):
        stream = runtime.generate(request(max_tokens=400))
        await anext(stream)
        await runtime.stop()
        await runtime.stop()
        with pytest.raises(EngineFailure, match="stopped"):
            await collect(stream)
        assert runtime.health() is not None


async def test_a_step_that_hangs_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.runtimes.torch_runtime.STUCK_AFTER_SECONDS", 0.05)
    async with started(folder) as (runtime, _):
        runtime.gate.open.clear()
        stream = runtime.generate(request())
        await until(lambda: "has not ended" in (runtime.health() or ""))
        runtime.gate.open.set()
        await collect(stream)
        await until(lambda: runtime.health() is None)


async def test_the_loop_stays_free_during_a_long_step(folder: Path) -> None:
    async with started(folder) as (runtime, _):
        runtime.gate.open.clear()
        stream = runtime.generate(request())
        began = time.monotonic()
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert time.monotonic() - began < 1.0
        runtime.gate.open.set()
        await collect(stream)


async def test_a_wrong_checkpoint_stops_the_start(tmp_path: Path) -> None:
    runtime = TorchRuntime(tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        await runtime.start()
    assert runtime.health() == "the engine is not running"
    await runtime.stop()


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "int8"])
async def test_the_dtype_in_effect_runs_and_is_told(folder: Path, dtype: str) -> None:
    runtime = TorchRuntime(folder, device="cpu", dtype=dtype)
    await runtime.start()
    try:
        deltas = (await collect(runtime.generate(request())))[0]
        assert sum(len(delta.token_ids) for delta in deltas) == 8
        auto = "int16" if level() is Level.AVX512_VNNI else "float16" if fbgemm_available() else "float32"
        assert runtime.info.dtype == (auto if dtype == "auto" else dtype)
    finally:
        await runtime.stop()


def test_a_dtype_that_the_runtime_lacks() -> None:
    for dtype in ("int16", "int8"):
        with pytest.raises(
            CheckpointError, match=f"--dtype {dtype} is not supported on cpu here; use float32, bfloat16"
        ):
            resolve_format(dtype, "cpu", packs=False)
        with pytest.raises(CheckpointError, match=f"--dtype {dtype} is not supported on cuda"):
            resolve_format(dtype, "cuda", packs=True)
