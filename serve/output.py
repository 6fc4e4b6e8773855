"""What comes back: tokens from a runtime (TokenDelta), text for a client (TextDelta), and the folded whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

IMPOSSIBLE_LOGPROB = -9999.0  # what an impossible token's log-probability is on the wire; never NaN or infinity


class FinishReason(StrEnum):
    STOP = "stop"  # EOS or a stop string
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's log-probability and the best alternatives, [(token_id, logprob)], best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one sequence, from a runtime.

    `index` = prompt · n + j. `token_ids` includes the ending EOS. `logprobs` is empty, or one entry a token id.
    `finish_reason` is set on the sequence's last delta; `error` says why when it is ERROR.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TextLogprob:
    """A token's log-probability with texts, as on the wire. `top` = alternatives, best first (their `top` is empty)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TextLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one output. The last delta of an index has `finish_reason`.

    `text` may be empty (tokens held back, or an end without text); `token_ids` are the tokens made since the
    output's last delta, so that token counts rise as tokens are made.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TextLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unknown_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds since acceptance: until the request left the queue, its first token, its end."""

    queue_ms: float = 0.0
    first_token_ms: float | None = None
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Output:
    """One finished sequence. `rationale` and `answer` are set in cot mode only."""

    index: int
    text: str
    finish_reason: FinishReason
    stop_reason: str | None = None
    rationale: str | None = None
    answer: str | None = None
    logprobs: tuple[TextLogprob, ...] | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Vote:
    """How often an answer came: `count` sequences, `weight` = their summed probability share (0…1)."""

    answer: str | None
    count: int
    weight: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation request; the same for REST, gRPC and FlanClient."""

    request_id: str
    model: str
    mode: str
    created: int
    outputs: tuple[Output, ...]
    max_tokens: int
    usage: Usage
    timings: Timings
    answer: str | None = None
    votes: tuple[Vote, ...] = ()
    tie: bool | None = None
    exemplars_used: int = 0
    exemplars_dropped: int = 0
    prompt: str | None = None  # only with debug
    # a prompt's tokens, one entry a prompt, only where asked for; nothing gives the first one's number, which is 0
    prompt_logprobs: tuple[tuple[TextLogprob, ...], ...] = ()
    stop: tuple[str, ...] | None = None  # the effective stop list; only with debug


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """`logprob` = sum over the candidate's tokens and EOS; `num_tokens` counts that EOS."""

    text: str
    logprob: float
    num_tokens: int
    probability: float

    @property
    def logprob_per_token(self) -> float:
        return self.logprob / self.num_tokens


@dataclass(frozen=True, slots=True)
class Scores:
    """A finished scoring request; `best` is an index into `candidates`."""

    request_id: str
    model: str
    candidates: tuple[CandidateScore, ...]
    best: int
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Tokenization:
    token_ids: tuple[int, ...]
    unknown_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
