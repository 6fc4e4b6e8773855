"""The meters: from the events of one request to its times. `DEFINITIONS` goes with every report.

A meter is only as good as the client that feeds it: a client that reads in blocks shows a first token when the last
one has come. `python -m loadtests selftest` checks the whole chain against a stub with known delays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

DEFINITIONS = {
    "ttft_ms": "time to first token: from the scheduled send to the first non-empty text (streams)",
    "tpot_ms": "time per output token: (end of the last output - first text) / (tokens per output - 1); the tokens are "
    "the server's count, the ending token included (streams)",
    "itl_ms": "inter-token latency: each gap between two texts of one output; a text may hold more than one token "
    "(streams)",
    "e2e_ms": "from the scheduled send to the last byte",
    "queue_ms": "time in the server's queue, as the server reports it",
    "lag_ms": "how late the load generator's own timer fires: latencies below it mean nothing",
    "goodput": "requests per second that meet every limit of the objective file's [goodput]",
    "tokens_per_second": "generated tokens of the finished requests / time from the first send to the last byte",
    "scheduled": "closed loop: when the user turned to the request; open loop (--arrival-rate): when the arrival was "
    "due, however late it was sent",
}


class RequestFailed(Exception):
    """The request was refused or broke; the message is short and has no ids, so that equal failures count as one."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one output; `finished` on its last."""

    index: int
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Final:
    """What the server says at the end. `texts` is empty on a stream whose last frame has no outputs."""

    prompt_tokens: int
    completion_tokens: int
    queue_ms: float | None
    answer: str | None
    texts: tuple[str, ...] = ()


class Client(Protocol):
    """A wire client. Both calls raise RequestFailed."""

    protocol: str

    def stream(self, fields: Mapping[str, Any]) -> Iterator[Piece | Final]: ...

    def generate(self, fields: Mapping[str, Any]) -> Final: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Measurement:
    """One request as its user saw it; times in milliseconds, `started` in seconds of `time.perf_counter`."""

    started: float
    e2e_ms: float = 0.0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    queue_ms: float | None = None
    itl_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    answer: str | None = None
    error: str | None = None


def measure(client: Client, fields: Mapping[str, Any], shape: str, scheduled: float | None = None) -> Measurement:
    """Send one request and time it from `scheduled` (default: now). Never raises RequestFailed."""
    result = Measurement(perf_counter() if scheduled is None else scheduled)
    try:
        if shape == "stream":
            _measure_stream(client.stream(fields), result)
        else:
            final = client.generate(fields)
            _take_final(final, result)
            result.text = final.texts[0] if final.texts else ""
    except RequestFailed as error:
        result.error = str(error)
    result.e2e_ms = (perf_counter() - result.started) * 1000
    return result


def _measure_stream(events: Iterator[Piece | Final], result: Measurement) -> None:
    first: float | None = None
    end = 0.0
    last_text: dict[int, float] = {}
    finished: set[int] = set()
    final: Final | None = None
    for event in events:
        now = perf_counter()
        if isinstance(event, Final):
            final = event
            continue
        if event.text:
            first = now if first is None else first
            if event.index in last_text:
                result.itl_ms.append((now - last_text[event.index]) * 1000)
            last_text[event.index] = now
            if event.index == 0:
                result.text += event.text
        if event.finished:
            finished.add(event.index)
            end = now
    if final is None or not finished:
        raise RequestFailed("the stream ended early")
    _take_final(final, result)
    if first is not None:
        result.ttft_ms = (first - result.started) * 1000
        tokens = final.completion_tokens / len(finished)
        if tokens > 1:
            result.tpot_ms = (end - first) * 1000 / (tokens - 1)


def _take_final(final: Final, result: Measurement) -> None:
    result.prompt_tokens, result.completion_tokens = final.prompt_tokens, final.completion_tokens
    result.queue_ms, result.answer = final.queue_ms, final.answer
