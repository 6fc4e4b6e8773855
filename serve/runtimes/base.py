"""What the service asks of a runtime: start, generate, score, health, stop.

A runtime takes token ids and gives token ids; it knows no text, no wire and no queue bound. All methods are called
from one asyncio event loop; the work itself runs elsewhere (a thread, a process), so no call may block the loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from serve.errors import CheckpointError
from serve.output import TokenDelta, TokenLogprob
from serve.request import PreparedRequest, PreparedScore


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """What a started runtime is. `device` cpu or cuda; `dtype` the one in effect (after `auto`)."""

    runtime: str
    architecture: str  # e.g. "T5ForConditionalGeneration"
    is_encoder_decoder: bool
    dtype: str
    device: str
    max_running_sequences: int
    context_length: int | None = None  # prompt and answer together, where the model has a bound


@dataclass(frozen=True, slots=True)
class StepStats:
    """One engine step, as observed; the runtime reports each through `on_step`.

    `encode_tokens` is 0 when the step encoded nothing, `decode_sequences` 0 when it decoded nothing. Seconds.
    `cache_usage` maps a pool's name ("self", "cross") to its used share, 0…1.
    """

    encode_tokens: int = 0
    encode_seconds: float = 0.0
    decode_sequences: int = 0
    decode_seconds: float = 0.0
    sequences_running: int = 0
    requests_waiting: int = 0
    encoder_cache_hits: int = 0
    cache_usage: tuple[tuple[str, float], ...] = ()


class TokenStream(Protocol):
    """The running sequences of one request. Iterate it for deltas; it ends when every sequence has finished.

    `started` is set (an awaitable event) when the engine begins the request's first encode.
    """

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...

    async def __anext__(self) -> TokenDelta:
        """The next delta of any of the sequences.

        Raises:
            StopAsyncIteration: all sequences have had their last delta, or were finished by `finish`.
            EngineFailure: the engine died; no sequence of this request goes on.
        """
        ...

    async def started(self) -> float:
        """Return once the engine has begun this request: when that was, by `time.monotonic` (raises EngineFailure if
        it never will)."""
        ...

    def finish(self, index: int) -> None:
        """End one sequence early (a stop string was met): its room is free before the next step, and no more
        deltas of it come."""
        ...

    async def aclose(self) -> None:
        """End all that still runs or waits; idempotent. Room is free before the engine's next step."""
        ...


class Runtime(Protocol):
    """A loaded model that runs many requests at once."""

    @property
    def info(self) -> RuntimeInfo: ...

    async def start(self) -> None:
        """Load weights and begin to accept work.

        Raises:
            CheckpointError: the checkpoint is wrong; the message names the tensor or file.
        """
        ...

    def generate(self, request: PreparedRequest) -> TokenStream:
        """Begin `len(request.prompts) * request.sampling.n` sequences; returns at once."""
        ...

    async def score(self, request: PreparedScore) -> tuple[tuple[float, int], ...]:
        """(summed log-probability, number of tokens) per candidate, in order. One encoder pass.

        Cancelling the awaiting task frees the room.

        Raises:
            EngineFailure
        """
        ...

    def health(self) -> str | None:
        """None when well, else what is wrong (the engine thread died, or its heartbeat is too old)."""
        ...

    async def stop(self) -> None:
        """Fail every waiter and release the device; idempotent."""
        ...


@runtime_checkable
class PromptScorer(Protocol):
    """What runtimes of decoder-only models can do besides: say how likely a prompt itself is."""

    async def prompt_logprobs(
        self, request_id: str, token_ids: tuple[int, ...], count: int
    ) -> tuple[TokenLogprob, ...]:
        """The log-probability of each token but the first, given those before it, with the `count` best ones.

        Cancelling the awaiting task frees the room.

        Raises:
            EngineFailure
        """
        ...


@runtime_checkable
class HasMetrics(Protocol):
    """A runtime with metrics of its own."""

    @property
    def metrics_registry(self) -> Any:
        """The prometheus registry that has them."""
        ...


__all__ = [
    "CheckpointError",
    "HasMetrics",
    "OnStep",
    "PromptScorer",
    "Runtime",
    "RuntimeInfo",
    "StepStats",
    "TokenStream",
]

OnStep = Callable[[StepStats], None]  # called from the engine's thread: must be cheap and thread-safe
