"""What a step of the engine brought."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.output import TokenDelta


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One step in numbers; the last three are as it left them."""

    encode_tokens: int
    decode_sequences: int
    encoder_cache_hits: int
    sequences_running: int
    requests_waiting: int
    cache_usage: tuple[tuple[str, float], ...]  # pool -> its share of the cache's bytes, 0..1


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """(summed log-probability, number of tokens) a candidate, in order; or why there is none."""

    scores: tuple[tuple[float, int], ...] = ()
    error: str | None = None


@dataclass(slots=True)
class StepOutput:
    """What a step brought."""

    started: tuple[str, ...] = ()
    deltas: dict[str, list[TokenDelta]] = field(default_factory=dict)  # by request, in order
    scores: dict[str, ScoreResult] = field(default_factory=dict)
    stats: EngineStats | None = None  # set by every step
