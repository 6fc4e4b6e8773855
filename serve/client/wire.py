"""What both transports share: calls as JSON-shaped dictionaries, results as the domain's dataclasses.

JSON is the pivot. REST sends it as it is; gRPC's messages have the same names, so that one builder and one parser
serve both and a new field is added once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, Literal

from serve.client.fields import GenerateFields, PromptFields
from serve.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    QueueFull,
    ServeError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from serve.output import (
    CandidateScore,
    Completion,
    FinishReason,
    Output,
    Scores,
    TextDelta,
    TextLogprob,
    Timings,
    Tokenization,
    Usage,
    Vote,
)
from serve.request import Exemplar

Json = dict[str, Any]
Method = Literal["generate", "score", "tokenize", "model"]

ERRORS: Mapping[str, type[ServeError]] = {
    error.kind: error
    for error in (
        InvalidRequest,
        TooLarge,
        Unauthorized,
        NotFound,
        MethodNotAllowed,
        QueueFull,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        EngineFailure,
    )
}


def to_error(body: Json, otherwise: type[ServeError], retry_after_seconds: float | None = None) -> ServeError:
    """The error that REST's `{"message", "param", "code"}` tells of.

    Args:
        otherwise: its class where `code` is none of our kinds: somebody between us and the server has answered.
    """
    kind = ERRORS.get(str(body.get("code")), otherwise)
    return kind(str(body["message"]), field=body.get("param"), retry_after_seconds=retry_after_seconds)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model and its limits, in tokens; `created` in seconds since 1970."""

    id: str
    created: int
    runtime: str
    dtype: str
    architecture: str
    max_input_tokens: int
    max_output_tokens: int
    modes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One call, ready for a transport. `expires` is on time.monotonic's clock; None = no deadline."""

    method: Method
    body: Json
    expires: float | None = None

    def remaining_seconds(self) -> float | None:
        """Time left.

        Raises:
            DeadlineExceeded: there is none.
        """
        return remaining_seconds(self.expires)


def remaining_seconds(expires: float | None) -> float | None:
    """Time left until a moment on time.monotonic's clock; None = no end.

    Raises:
        DeadlineExceeded: there is none.
    """
    if expires is None:
        return None
    remaining = expires - time.monotonic()
    if remaining <= 0:
        raise DeadlineExceeded("the timeout passed")
    return remaining


class UnknownField(TypeError):
    """A field that the contract does not have: a TypeError, as Python raises for an unknown keyword."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        close = get_close_matches(name, known, n=1)
        super().__init__(f"unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        self.name = name


def to_expires(timeout: float | None) -> float | None:
    """A timeout in seconds from now as a moment on time.monotonic's clock."""
    return None if timeout is None else time.monotonic() + timeout


def to_call(method: Method, expires: float | None, fields: Mapping[str, Any]) -> Call:
    """The call with the fields that were said.

    Raises:
        UnknownField: a field that the contract does not have.
        InvalidRequest: bytes where text belongs.
    """
    known = _KNOWN_FIELDS[method]
    for name in fields:
        if name not in known:
            raise UnknownField(str(name), known)
    body = {name: _plain(name, value) for name, value in fields.items() if value is not None}
    return Call(method, body, expires)


_KNOWN_FIELDS: Mapping[Method, frozenset[str]] = {
    "generate": frozenset({"instruction", *GenerateFields.__annotations__, *PromptFields.__annotations__}),
    "score": frozenset({"instruction", "candidates", *PromptFields.__annotations__}),
    "tokenize": frozenset({"text", "add_special_tokens", "model"}),
    "model": frozenset(),
}


def _plain(name: str, value: Any) -> Any:
    """The value as JSON has it: words for enums, objects for exemplars, lists for sequences."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Exemplar):
        return {part: text for part, text in asdict(value).items() if text is not None}
    if isinstance(value, Mapping):
        return {key: _plain(name, item) for key, item in value.items() if item is not None}
    if isinstance(value, bytes | bytearray):  # protobuf would take them, JSON would not
        raise InvalidRequest(f"{name} must be text, not bytes", field=name)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(name, item) for item in value]
    return value


def to_completion(data: Json) -> Completion:
    return Completion(
        request_id=data["request_id"],
        model=data["model"],
        mode=data["mode"],
        created=data["created"],
        outputs=tuple(_to_output(output) for output in data["outputs"]),
        max_tokens=data["max_tokens"],
        usage=_to_usage(data["usage"]),
        timings=_to_timings(data["timings"]),
        answer=data.get("answer"),
        votes=tuple(Vote(vote.get("answer"), vote["count"], vote["weight"]) for vote in data.get("votes") or ()),
        tie=data.get("tie"),
        exemplars_used=data.get("exemplars_used", 0),
        exemplars_dropped=data.get("exemplars_dropped", 0),
        prompt=data.get("prompt"),
        stop=tuple(data.get("stop") or ()) if data.get("prompt") is not None else None,
    )


def to_delta(data: Json) -> TextDelta:
    reason = data.get("finish_reason")
    return TextDelta(
        index=data["index"],
        text=data["text"],
        logprobs=_to_logprobs(data.get("logprobs")),
        finish_reason=None if reason is None else FinishReason(reason),
        stop_reason=data.get("stop_reason"),
    )


def to_scores(data: Json) -> Scores:
    return Scores(
        request_id=data["request_id"],
        model=data["model"],
        candidates=tuple(
            CandidateScore(item["text"], item["logprob"], item["num_tokens"], item["probability"])
            for item in data["candidates"]
        ),
        best=data["best"],
        usage=_to_usage(data["usage"]),
        timings=_to_timings(data["timings"]),
    )


def to_tokenization(data: Json) -> Tokenization:
    return Tokenization(tuple(data["token_ids"]), data["unknown_tokens"])


def to_model_info(data: Json) -> ModelInfo:
    values = {name: data[name] for name in ModelInfo.__dataclass_fields__}
    return ModelInfo(**values | {"modes": tuple(data["modes"])})


def _to_output(data: Json) -> Output:
    return Output(
        index=data["index"],
        text=data["text"],
        finish_reason=FinishReason(data["finish_reason"]),
        stop_reason=data.get("stop_reason"),
        rationale=data.get("rationale"),
        answer=data.get("answer"),
        logprobs=_to_logprobs(data.get("logprobs")) or None,
    )


def _to_logprobs(items: Iterable[Json] | None) -> tuple[TextLogprob, ...]:
    return tuple(
        TextLogprob(item["token_id"], item["text"], item["logprob"], _to_logprobs(item.get("top")))
        for item in items or ()
    )


def _to_usage(data: Json) -> Usage:
    return Usage(data["prompt_tokens"], data["completion_tokens"], data.get("unknown_tokens", 0))


def _to_timings(data: Json) -> Timings:
    return Timings(data["queue_ms"], data.get("first_token_ms"), data["total_ms"])
