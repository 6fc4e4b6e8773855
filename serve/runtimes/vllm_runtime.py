"""vLLM behind the Runtime protocol: every sequence is a vLLM request of its own, followed by one task.

So one sequence can be ended, seeded and aborted by itself; that n sequences share one prefill is what vLLM's prefix
cache sees to. vLLM's engine runs in a process of its own; when that dies, every waiter fails.

Two things differ from our own engine (README, runtimes): log-probabilities are the model's own, before penalty and
bias; and a logit that is not finite is not noticed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import weakref
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from serve.errors import CheckpointError, EngineFailure
from serve.output import FinishReason, TokenDelta, TokenLogprob
from serve.request import PreparedRequest, PreparedScore
from serve.runtimes.base import OnStep, RuntimeInfo
from serve.runtimes.runtime_args import Value
from serve.runtimes.torch_stream import TorchStream
from serve.runtimes.vllm_engine import EngineSettings, ModelFacts, StepObserver, start_engine, stat_logger_factory
from serve.runtimes.vllm_requests import to_delta, to_logprob, to_prompt, to_sampling_params, to_scoring_params
from serve.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

STUCK_AFTER_SECONDS = 120.0  # without any sign of life while there is work
_DTYPES = ("float32", "bfloat16", "float16")
_DEAD = "vLLM's engine has died; its log says why"


class VllmRuntime:
    """A checkpoint served by vLLM; see serve.runtimes.base.Runtime for the contract."""

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
        trust_checkpoint: bool = False,
        max_sequence_tokens: int | None = None,
        runtime_args: Mapping[str, Value] | None = None,
    ) -> None:
        """Cheap: nothing is read before `start`.

        `vocab_limit` is the tokenizer's size; `max_sequence_tokens` the longest prompt and its longest answer;
        `runtime_args` what `--runtime-arg` gives (runtime_args.VLLM_ARGS).
        """
        self._folder = model_dir
        self._device = _resolve_device(device)
        self._dtype = _resolve_dtype(dtype, self._device)
        self._max_running_sequences = max_running_sequences
        self._encode_tokens_per_step = encode_tokens_per_step
        self._vocab_limit = vocab_limit
        self._trust_checkpoint = trust_checkpoint
        self._max_sequence_tokens = max_sequence_tokens
        self._runtime_args = {} if runtime_args is None else dict(runtime_args)
        self._facts = ModelFacts()
        self._context_length: int | None = None
        self._observer = StepObserver(on_step)
        self._llm: AsyncLLM | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keys = itertools.count()
        self._streams: weakref.WeakValueDictionary[str, TorchStream] = weakref.WeakValueDictionary()
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._idle_since = 0.0
        self._failure: str | None = None

    @property
    def info(self) -> RuntimeInfo:
        return RuntimeInfo(
            runtime="vllm",
            architecture=self._facts.architecture,
            is_encoder_decoder=self._facts.is_encoder_decoder,
            dtype=self._dtype,
            device=self._device,
            max_running_sequences=self._max_running_sequences,
            context_length=self._context_length,
        )

    @property
    def metrics_registry(self) -> Any:
        """The prometheus registry that has vLLM's own metrics, all named `vllm:…`."""
        return get_prometheus_registry()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._facts = facts = ModelFacts.from_folder(self._folder)
        self._observer.is_encoder_decoder = facts.is_encoder_decoder
        settings = EngineSettings(
            folder=self._folder,
            facts=facts,
            device=self._device,
            dtype=self._dtype,
            max_running_sequences=self._max_running_sequences,
            encode_tokens_per_step=self._encode_tokens_per_step,
            max_sequence_tokens=self._max_sequence_tokens,
            vocab_limit=self._vocab_limit,
            trust_checkpoint=self._trust_checkpoint,
            arguments=self._runtime_args,
        )
        stat_logger = stat_logger_factory(self._observer)
        llm = await asyncio.to_thread(start_engine, settings, stat_logger)
        if self._failure is not None:  # stopped meanwhile
            await asyncio.to_thread(llm.shutdown, 0.0)
            return
        self._llm = llm
        if not facts.is_encoder_decoder:
            self._context_length = llm.model_config.max_model_len

    def generate(self, request: PreparedRequest) -> TorchStream:
        key = f"{next(self._keys)}-{request.request_id}"  # a client may use one id twice
        stream = TorchStream(self, key, request.num_sequences)
        problem = self.health()
        if problem is not None:
            stream.fail(problem)
            return stream
        self._streams[key] = stream
        sampling = request.sampling
        for number, prompt in enumerate(request.prompts):
            for sample in range(sampling.n):
                index = number * sampling.n + sample
                task = asyncio.ensure_future(self._follow(key, index, prompt.token_ids, sampling))
                self._tasks[key, index] = task
                task.add_done_callback(partial(self._forget, (key, index)))
        stream.begin()
        return stream

    async def score(self, request: PreparedScore) -> tuple[tuple[float, int], ...]:
        prompt = request.prompt.token_ids
        parts = await self._gather(
            [self._forced(request.request_id, prompt, ids, 0) for ids in request.candidate_token_ids]
        )
        self._observer.encoded(len(prompt))
        return tuple((sum(entry.logprob for entry in entries), len(entries)) for entries in parts)

    async def prompt_logprobs(
        self, request_id: str, token_ids: tuple[int, ...], count: int
    ) -> tuple[TokenLogprob, ...]:
        """The log-probability of each token but the first, given those before it, with the `count` best ones.

        Decoder-only models. Cancelling the awaiting task frees the room.

        Raises:
            EngineFailure
        """
        if len(token_ids) < 2:
            return ()
        return await self._forced(request_id, token_ids[:1], token_ids[1:], count)

    def health(self) -> str | None:
        if self._failure is not None:
            return self._failure
        if self._llm is None:
            return "the engine is not running"
        if self._llm.errored:
            self._fail_all(_DEAD)
            return self._failure
        quiet = time.monotonic() - max(self._observer.last_sign, self._idle_since)
        if self._tasks and quiet > STUCK_AFTER_SECONDS:
            return f"vLLM's engine has given no sign of life for {quiet:.0f} s"
        if not self._tasks:
            self._idle_since = time.monotonic()
        return None

    async def stop(self) -> None:
        self._fail_all(self._failure or "the engine was stopped")
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown, 0.0)

    def abort(self, key: str) -> None:
        """End all sequences of a request. From any thread."""
        self._in_loop(self._cancel, key, None)

    def finish(self, key: str, index: int) -> None:
        """End one sequence."""
        self._in_loop(self._cancel, key, index)

    def _forget(self, place: tuple[str, int], task: asyncio.Task[None]) -> None:
        del self._tasks[place]

    def _in_loop(self, callback: Any, *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _cancel(self, key: str, index: int | None) -> None:
        for place, task in list(self._tasks.items()):
            if place[0] == key and index in (None, place[1]):
                task.cancel()

    async def _follow(self, key: str, index: int, prompt: tuple[int, ...], sampling: SamplingParams) -> None:
        """One sequence from its beginning to its last delta."""
        facts = self._facts
        params = to_sampling_params(sampling, index % sampling.n, facts.eos_token_ids)
        ended = False
        try:
            facts.check_ids(prompt)
            given = to_prompt(prompt, is_encoder_decoder=facts.is_encoder_decoder)
            encoded = not facts.is_encoder_decoder or index % sampling.n > 0  # the samples share one pass
            async for output in self._run(given, params, f"{key}-{index}"):
                if not encoded:
                    self._observer.encoded(len(prompt))
                    encoded = True
                delta = to_delta(index, output, sampling.logprobs, self._vocab_limit)
                ended = delta.finish_reason is not None
                self._put(key, delta)
            if not ended:
                self._put(key, _failed(index, "vLLM ended the sequence without a reason"))
        except EngineDeadError:
            self._fail_all(_DEAD)
        except (VLLMClientError, ValueError) as error:
            self._put(key, _failed(index, str(error)))
        except EngineFailure as error:
            self._put(key, _failed(index, error.message))
        except Exception as error:
            logger.exception("sequence %d of request %s failed", index, key)
            self._put(key, _failed(index, f"generation failed: {type(error).__name__}"))

    async def _forced(
        self, request_id: str, prompt: tuple[int, ...], forced: tuple[int, ...], count: int
    ) -> tuple[TokenLogprob, ...]:
        """The log-probability of each of the `forced` tokens after the prompt, with the `count` best ones.

        Raises:
            EngineFailure
        """
        key = f"{next(self._keys)}-{request_id}"
        try:
            self._facts.check_ids(prompt)
            self._facts.check_ids(forced)
            given = to_prompt(prompt, forced, is_encoder_decoder=self._facts.is_encoder_decoder)
            async for output in self._run(given, to_scoring_params(count), key):
                if output.prompt_logprobs:
                    pairs = zip(forced, output.prompt_logprobs[-len(forced) :], strict=True)
                    return tuple(to_logprob(token_id, found, count, self._vocab_limit) for token_id, found in pairs)
        except EngineDeadError:
            self._fail_all(_DEAD)
            raise EngineFailure(_DEAD) from None
        except (VLLMClientError, EngineGenerateError, ValueError) as error:
            raise EngineFailure(f"scoring failed: {error}") from error
        raise EngineFailure("vLLM gave no log-probabilities")

    def _run(self, prompt: dict[str, Any], params: Any, key: str) -> AsyncIterator[Any]:
        """
        Raises:
            EngineFailure: it is not running.
        """
        problem = self.health()
        if problem is not None or self._llm is None:
            raise EngineFailure(problem or "the engine is not running")
        outputs: AsyncIterator[Any] = self._llm.generate(prompt, params, key)
        return outputs

    async def _gather(self, calls: list[Any]) -> list[Any]:
        """All results; when one fails or we are cancelled, the others end, too."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _put(self, key: str, delta: TokenDelta) -> None:
        if (stream := self._streams.get(key)) is not None:
            stream.put([delta])

    def _fail_all(self, message: str) -> None:
        """Every waiter gets an EngineFailure, and so does everybody who comes later."""
        if self._failure is None:
            self._failure = message
        for stream in list(self._streams.values()):
            stream.fail(self._failure)


def _failed(index: int, why: str) -> TokenDelta:
    return TokenDelta(index, (), finish_reason=FinishReason.ERROR, error=why)


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device cuda: this machine has no usable CUDA device; use --device cpu")
    return device


def _resolve_dtype(dtype: str, device: str) -> str:
    if dtype == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"--dtype {dtype} is not supported by the vllm runtime; use {', '.join(_DTYPES)}, "
            "or --runtime-arg quantization=…"
        )
    return dtype
