"""Our own engine behind the Runtime protocol: one engine thread, one inbox, one hand-over to the event loop a step.

The engine thread: take the inbox (add, finish, abort, score) -> one engine step -> hand everything it brought to the
loop in a single callback -> again; it sleeps while there is nothing to do. Nothing of the engine is touched from the
loop, nothing of the loop from the engine thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.engine.loading import load_model, make_engine, make_runner
from serve.engine.model import T5Model
from serve.engine.number_format import NumberFormat
from serve.engine.runner import Runner
from serve.engine.sampler import Sampled
from serve.engine.scheduler import ScoreChunk, StepPlan
from serve.engine.sequence import Prompt
from serve.engine.step_output import EngineStats, ScoreResult, StepOutput
from serve.errors import CheckpointError, EngineFailure
from serve.request import PreparedRequest, PreparedScore
from serve.runtimes.base import OnStep, RuntimeInfo, StepStats
from serve.runtimes.torch_stream import TorchStream

logger = logging.getLogger(__name__)

STUCK_AFTER_SECONDS = 60.0  # a step that takes longer is taken for a hang
_CUDA_CACHE_SHARE = 0.8  # of what is free once the weights are loaded
_CPU_CACHE_SHARE = 0.25  # of the memory; it is taken only as requests need it
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MAX_CPU_CACHE_BYTES = 4 << 30
ENCODER_CACHE_SHARE = 8  # one part in so many is for prompts that are not in use
# What the event loop does for a step's tokens. Where the engine has every core they wait for each other: one row of
# flan-t5-small was 1.7 times as fast on one of two cores, although a step alone is faster on both.
_EVENT_LOOP_SECONDS = 0.001

T = TypeVar("T")
Command = Callable[[Engine], None]  # something for the engine thread to do between two steps


def resolve_device(device: str) -> str:
    """`auto` is cuda where there is one.

    Raises:
        CheckpointError: cuda was asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    return device


def resolve_format(dtype: str, device: str, *, packs: bool) -> NumberFormat:
    """What `--dtype` means on a device; see NumberFormat.of.

    Raises:
        CheckpointError: a dtype that this runtime does not have.
    """
    try:
        return NumberFormat.of(dtype, device, packs=packs)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


class TimedRunner:
    """Passes everything on and adds up how long encoding and decoding took; the engine itself knows no clock.

    On CUDA nobody waits for the card but who reads the sampled ids, so there the time of encoding shows in decoding's.
    """

    def __init__(self, runner: Runner[Any]) -> None:
        self._runner = runner
        self.encode_seconds = 0.0
        self.decode_seconds = 0.0

    def prepare(self, plan: StepPlan) -> None:
        self.encode_seconds = self.decode_seconds = 0.0
        self._runner.prepare(plan)

    def encode(self, prompts: Sequence[Prompt]) -> None:
        began = time.perf_counter()
        try:
            self._runner.encode(prompts)
        finally:
            self.encode_seconds += time.perf_counter() - began

    def score(self, chunk: ScoreChunk) -> list[float]:
        began = time.perf_counter()
        try:
            return self._runner.score(chunk)
        finally:
            self.decode_seconds += time.perf_counter() - began

    def decode(self, plan: StepPlan) -> Any:
        began = time.perf_counter()
        try:
            return self._runner.decode(plan)
        finally:
            self.decode_seconds += time.perf_counter() - began

    def sample(self, logits: Any, plan: StepPlan) -> Sampled:
        began = time.perf_counter()
        try:
            return self._runner.sample(logits, plan)
        finally:
            self.decode_seconds += time.perf_counter() - began


class TorchRuntime:
    """A T5 checkpoint served by `serve.engine`; see serve.runtimes.base.Runtime for the contract."""

    packs_weights = True  # whether the model can hold its weights in a format of their own

    def __init__(  # noqa: PLR0913 - the options of the command line, keyword only
        self,
        model_dir: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_running_sequences: int = 32,
        encode_tokens_per_step: int = 2048,
        vocab_limit: int | None = None,
        on_step: OnStep | None = None,
        cache_bytes: int | None = None,
        trust_checkpoint: bool = False,
    ) -> None:
        """Cheap: nothing is read before `start`.

        `vocab_limit` is the tokenizer's size; `cache_bytes` None takes a share of the free memory.
        """
        self._model_dir = model_dir
        self._device = resolve_device(device)
        self._format = resolve_format(dtype, self._device, packs=self.packs_weights)
        self._max_running_sequences = max_running_sequences
        self._encode_tokens_per_step = encode_tokens_per_step
        self._vocab_limit = vocab_limit
        self._on_step = on_step
        self._cache_bytes = cache_bytes
        self._trust_checkpoint = trust_checkpoint
        self._architecture = "T5ForConditionalGeneration"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: deque[Command] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._failure: str | None = None
        self._step_began: float | None = None  # monotonic time; None while the thread sleeps
        self._keys = itertools.count()
        self._streams: weakref.WeakValueDictionary[str, TorchStream] = weakref.WeakValueDictionary()
        self._scores: dict[str, asyncio.Future[tuple[tuple[float, int], ...]]] = {}

    @property
    def info(self) -> RuntimeInfo:
        return RuntimeInfo(
            runtime="torch",
            architecture=self._architecture,
            is_encoder_decoder=True,
            dtype=self._format.name,
            device=self._device,
            max_running_sequences=self._max_running_sequences,
        )

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        engine, timed = await asyncio.to_thread(self._load)
        if self._stopping:
            return
        self._thread = threading.Thread(target=self._run, args=(engine, timed), name="flan-engine", daemon=True)
        self._thread.start()

    def generate(self, request: PreparedRequest) -> TorchStream:
        key = f"{next(self._keys)}-{request.request_id}"  # a client may use one id twice
        stream = TorchStream(self, key, request.num_sequences)
        if self._failure is not None or self._thread is None:
            stream.fail(self._failure or "the engine is not running")
            return stream
        self._streams[key] = stream
        prompts = [prompt.token_ids for prompt in request.prompts]
        self._command(lambda engine: engine.add(key, prompts, request.sampling))
        return stream

    async def score(self, request: PreparedScore) -> tuple[tuple[float, int], ...]:
        if self._failure is not None or self._thread is None or self._loop is None:
            raise EngineFailure(self._failure or "the engine is not running")
        key = f"{next(self._keys)}-{request.request_id}"
        future: asyncio.Future[tuple[tuple[float, int], ...]] = self._loop.create_future()
        self._scores[key] = future
        prompt_ids, candidates = request.prompt.token_ids, request.candidate_token_ids
        self._command(lambda engine: engine.add_score(key, prompt_ids, candidates))
        try:
            return await future
        except asyncio.CancelledError:
            self.abort(key)
            raise
        finally:
            self._scores.pop(key, None)

    def health(self) -> str | None:
        if self._failure is not None:
            return self._failure
        if self._thread is None:
            return "the engine is not running"
        if not self._thread.is_alive():
            return "the engine thread has ended"
        began = self._step_began
        if began is not None and time.monotonic() - began > STUCK_AFTER_SECONDS:
            return f"the engine's step has not ended for {time.monotonic() - began:.0f} s"
        return None

    async def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread.is_alive():
            # A thread that hangs in a step cannot be stopped; it is a daemon and dies with the process.
            await asyncio.to_thread(self._thread.join, 5.0)
        self._fail_all(self._failure or "the engine was stopped")

    def abort(self, key: str) -> None:
        """Have the engine drop a request before its next step. From any thread."""
        self._command(lambda engine: engine.abort(key))

    def finish(self, key: str, index: int) -> None:
        """Have the engine drop one sequence before its next step."""
        self._command(lambda engine: engine.finish(key, index))

    def _command(self, command: Command) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _load(self) -> tuple[Engine, TimedRunner]:
        model = load_model(
            self._model_dir,
            device=torch.device(self._device),
            dtype=self._format.dtype,
            weights=self._format.weights,
            vocab_limit=self._vocab_limit,
            trust_checkpoint=self._trust_checkpoint,
        )
        self._architecture = model.config.architecture
        total = default_cache_bytes(self._device) if self._cache_bytes is None else self._cache_bytes
        settings = EngineSettings(
            max_running_sequences=self._max_running_sequences,
            encode_tokens_per_step=self._encode_tokens_per_step,
            cache_bytes=max(1, total - total // ENCODER_CACHE_SHARE),
            encoder_cache_bytes=total // ENCODER_CACHE_SHARE,
            thread_worth_seconds=_EVENT_LOOP_SECONDS if torch.get_num_threads() >= (os.cpu_count() or 1) else 0.0,
        )
        timed = TimedRunner(self.make_runner(model, settings))
        return make_engine(model, settings, timed), timed

    def make_runner(self, model: T5Model, settings: EngineSettings) -> Runner[Any]:
        """What carries out the engine's plans; a subclass may wrap it."""
        return make_runner(model, settings)

    # --- the engine thread ---

    def _run(self, engine: Engine, timed: TimedRunner) -> None:
        try:
            self._serve(engine, timed)
        except BaseException as error:
            logger.exception("the engine failed")
            self._failure = f"the engine failed: {type(error).__name__}: {error}"
            self._hand_over(self._fail_all, self._failure)
        finally:
            self._step_began = None

    def _serve(self, engine: Engine, timed: TimedRunner) -> None:
        while not self._stopping:
            self._wake.clear()  # before the inbox is read: what comes later sets it again
            self._step_began = began = time.monotonic()
            while self._inbox:
                self._inbox.popleft()(engine)
            if not engine.has_work:
                self._step_began = None
                self._wake.wait()
                continue
            output = engine.step()
            if output.stats is not None:
                self._observe(_step_stats(output.stats, timed))
            if output.started or output.deltas or output.scores:
                self._hand_over(self._deliver, (output, began))

    def _observe(self, stats: StepStats) -> None:
        """Who only watches must not be able to end the engine."""
        if self._on_step is None:
            return
        try:
            self._on_step(stats)
        except Exception:
            logger.exception("observing a step failed")

    def _hand_over(self, callback: Callable[[T], None], value: T) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(callback, value)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._stopping = True

    # --- the event loop ---

    def _deliver(self, told: tuple[StepOutput, float]) -> None:
        """What a step brought, and when it began: that is when the requests that it took in left the queue."""
        output, began = told
        for key in output.started:
            if (stream := self._streams.get(key)) is not None:
                stream.begin(began)
        for key, deltas in output.deltas.items():
            if (stream := self._streams.get(key)) is not None:
                stream.put(deltas)
        for key, result in output.scores.items():
            if (future := self._scores.get(key)) is not None and not future.done():
                _settle(future, result)

    def _fail_all(self, message: str) -> None:
        """Every waiter gets an EngineFailure, and so does everybody who comes later."""
        self._failure = message
        for stream in list(self._streams.values()):
            stream.fail(message)
        for future in self._scores.values():
            if not future.done():
                future.set_exception(EngineFailure(message))


def _settle(future: asyncio.Future[tuple[tuple[float, int], ...]], result: ScoreResult) -> None:
    if result.error is None:
        future.set_result(result.scores)
    else:
        future.set_exception(EngineFailure(result.error))


def _step_stats(stats: EngineStats, timed: TimedRunner) -> StepStats:
    return StepStats(
        encode_tokens=stats.encode_tokens,
        encode_seconds=timed.encode_seconds,
        decode_sequences=stats.decode_sequences,
        decode_seconds=timed.decode_seconds,
        sequences_running=stats.sequences_running,
        requests_waiting=stats.requests_waiting,
        encoder_cache_hits=stats.encoder_cache_hits,
        cache_usage=stats.cache_usage,
    )


def default_cache_bytes(device: str) -> int:
    """A share of the device's free memory; on a CPU, of what the machine has or the container is allowed."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0] * _CUDA_CACHE_SHARE)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        total = min(total, int(_CGROUP_LIMIT.read_text(encoding="ascii")))
    return min(_MAX_CPU_CACHE_BYTES, int(total * _CPU_CACHE_SHARE))
