"""One request from its arrival to its one outcome: what metrics count, the log says and a trace shows of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

from serve.errors import ServeError, UnknownField
from serve.output import FinishReason
from serve.request import Mode, PreparedRequest

NO_MODE = "none"  # the `mode` label of a request that has none (tokenize) or was refused before it was read
TRACE_HEADERS = ("traceparent", "tracestate")  # W3C Trace Context, as HTTP headers and as gRPC metadata


class Protocol(StrEnum):
    REST = "rest"
    GRPC = "grpc"


class Route(StrEnum):
    GENERATE = "generate"
    GENERATE_MANY = "generate_many"
    SCORE = "score"
    TOKENIZE = "tokenize"
    COMPLETIONS = "completions"
    CHAT = "chat"
    TGI = "tgi"


class Outcome(StrEnum):
    """How a request ended; exactly one is counted for each."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    INVALID = "invalid"
    UNAUTHORIZED = "unauthorized"
    REFUSED = "refused"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True)
class TraceFacts:
    """What a trace shows of a request beyond its log line. As there, no place for a prompt, an output or a key.

    `parent` = the client's W3C headers; `started_ns` = wall clock at arrival; `requested_model` = a name of ours that
    the request used (a name that we do not have is the client's word, and is not kept); `accepted` = it got as far as
    the queue. The sampling fields are those in effect.
    """

    started_ns: int
    parent: Mapping[str, str] = field(default_factory=dict)
    requested_model: str | None = None
    served_model: str | None = None
    accepted: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_sequences: int | None = None
    finish_reasons: tuple[str, ...] = ()

    def take(self, prepared: PreparedRequest) -> None:
        """Note what was accepted."""
        sampling = prepared.sampling
        self.max_tokens, self.num_sequences = sampling.max_tokens, prepared.num_sequences
        self.temperature, self.top_p, self.top_k = sampling.temperature, sampling.top_p, sampling.top_k


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A finished request, as logs tell it. Never holds a prompt, an output or a key. Times in milliseconds."""

    protocol: Protocol
    route: Route
    mode: str
    outcome: Outcome
    total_ms: float
    request_id: str | None = None
    error: str | None = None  # the kind, e.g. "queue_full"
    field: str | None = None  # the request field at fault; never an unknown one, whose name is the client's
    detail: str | None = None  # our own message, for engine failures only: no other may quote the client
    queue_ms: float | None = None
    first_token_ms: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    facts: TraceFacts | None = None  # for traces, not for the log line


class RequestTracker:
    """Follows one request from its arrival to its one outcome; whoever sets an outcome first decides it.

    As a context manager: leaving with an exception calls `fail`, leaving without an outcome counts as `stop`.
    Streams do not use `with`: their tracker ends with the response stream.

    Args:
        on_end: told of the finished request, once.
    """

    def __init__(self, on_end: Callable[[RequestRecord], None], protocol: Protocol, route: Route) -> None:
        self._on_end = on_end
        self.protocol = protocol
        self.route = route
        self.started = time.monotonic()
        self.facts = TraceFacts(started_ns=time.time_ns())
        self.mode: Mode | None = None
        self.request_id: str | None = None
        self.outcome: Outcome | None = None
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def elapsed(self) -> float:
        """Seconds since arrival."""
        return time.monotonic() - self.started

    def fail(self, error: BaseException) -> None:
        """The request ended with an error; idempotent."""
        if isinstance(error, ServeError):
            # An EngineFailure's message is ours; others may quote what the client sent.
            detail = error.message if error.outcome == Outcome.ERROR else None
            at_fault = None if isinstance(error, UnknownField) else error.field
            self._end(Outcome(error.outcome), error.kind, at_fault, detail)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._end(Outcome.CANCELLED, "cancelled")
        else:
            self._end(Outcome.ERROR, "internal", detail=type(error).__name__)

    def finish(self, outcome: str) -> None:
        """The request ended; idempotent.

        Raises:
            ValueError: no such outcome.
        """
        self._end(Outcome(outcome))

    def __enter__(self) -> RequestTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        else:
            self.finish(Outcome.STOP)

    def _end(
        self, outcome: Outcome, error: str | None = None, field: str | None = None, detail: str | None = None
    ) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        record = RequestRecord(
            protocol=self.protocol,
            route=self.route,
            mode=NO_MODE if self.mode is None else self.mode.value,
            outcome=outcome,
            total_ms=self.elapsed() * 1000,
            request_id=self.request_id,
            error=error,
            field=field,
            detail=detail,
            queue_ms=_to_ms(self.queue_seconds),
            first_token_ms=_to_ms(self.first_token_seconds),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            facts=self.facts,
        )
        self._on_end(record)


def trace_parent(get: Callable[[str], str | bytes | None]) -> dict[str, str]:
    """The client's trace context, from its headers or metadata; empty where it sent none."""
    found = ((name, get(name)) for name in TRACE_HEADERS)
    return {name: value for name, value in found if isinstance(value, str)}


def outcome_of(reasons: Iterable[FinishReason]) -> Outcome:
    """The outcome of a request whose sequences ended so: the worst one decides.

    >>> outcome_of([FinishReason.STOP, FinishReason.LENGTH]).value
    'length'
    """
    seen = set(reasons)
    for reason in (FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.LENGTH):
        if reason in seen:
            return Outcome(reason.value)
    return Outcome.STOP


def _to_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
