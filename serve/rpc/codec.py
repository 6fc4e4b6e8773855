"""Between protobuf messages and the domain's requests and results. Field names are the same on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from google.protobuf.message import DecodeError, Message

from protos.flan.v1 import generation_pb2 as pb
from serve.errors import InvalidRequest, ServeError
from serve.output import Completion, FinishReason, Scores, TextDelta, TextLogprob, Timings, Tokenization, Usage, Vote
from serve.request import Exemplar, GenerateRequest, Mode, ScoreRequest
from serve.sampling_params import SamplingFields
from serve.service import ModelCard

M = TypeVar("M", bound=Message)

_MODES = {pb.Mode.Value(f"MODE_{mode.name}"): mode for mode in Mode}
_MODE_VALUES = {mode.value: value for value, mode in _MODES.items()}
_FINISH_REASONS = {reason: pb.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason}
_ANSWER_FORMATS: dict[int, Literal["text", "number"]] = {
    pb.ANSWER_FORMAT_TEXT: "text",
    pb.ANSWER_FORMAT_NUMBER: "number",
}
_SAMPLING_SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "seed",
    "n",
    "logprobs",
    "ignore_eos",
    "skip_special_tokens",
)


def parse(message_class: type[M], raw: bytes) -> M:
    """The message in `raw`.

    Raises:
        InvalidRequest: not such a message; a string that is not UTF-8 ends here too.
    """
    try:
        return message_class.FromString(raw)
    except DecodeError:
        name = message_class.DESCRIPTOR.full_name
        raise InvalidRequest(f"the message is not a {name}, or a text in it is not UTF-8") from None


def to_request(
    message: pb.GenerateRequest, *, request_id: str | None, timeout_seconds: float | None
) -> GenerateRequest:
    """The request as asked. Ranges are the service's to check; here only what a dataclass cannot hold is refused.

    Raises:
        InvalidRequest: naming the field.
    """
    return GenerateRequest(
        **_prompt_fields(message),
        samples=_said(message, "samples"),
        answer_format=_answer_format(message),
        sampling=SamplingFields(
            **{name: _said(message, name) for name in _SAMPLING_SCALARS},
            stop=tuple(message.stop) if message.stop else None,
            logit_bias=dict(message.logit_bias) if message.logit_bias else None,
        ),
        debug=message.debug,
        request_id=request_id,
        timeout_seconds=timeout_seconds,
    )


def to_score_request(
    message: pb.ScoreRequest, *, request_id: str | None, timeout_seconds: float | None
) -> ScoreRequest:
    """The scoring request as asked.

    Raises:
        InvalidRequest: naming the field.
    """
    return ScoreRequest(
        **_prompt_fields(message),
        candidates=tuple(message.candidates),
        request_id=request_id,
        timeout_seconds=timeout_seconds,
    )


def to_response(completion: Completion) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        request_id=completion.request_id,
        model=completion.model,
        mode=_MODE_VALUES[completion.mode],
        created=completion.created,
        outputs=[
            pb.Output(
                index=output.index,
                text=output.text,
                rationale=output.rationale,
                answer=output.answer,
                finish_reason=_FINISH_REASONS[output.finish_reason],
                stop_reason=output.stop_reason,
                logprobs=_to_logprobs(output.logprobs or ()),
            )
            for output in completion.outputs
        ],
        answer=completion.answer,
        votes=map(_to_vote, completion.votes),
        tie=completion.tie,
        max_tokens=completion.max_tokens,
        exemplars_used=completion.exemplars_used,
        exemplars_dropped=completion.exemplars_dropped,
        prompt=completion.prompt,
        stop=completion.stop or (),
        usage=_to_usage(completion.usage),
        timings=_to_timings(completion.timings),
    )


def to_delta(delta: TextDelta) -> pb.GenerateStreamResponse | None:
    """The stream's message; None where the delta has nothing to show."""
    if not delta.text and not delta.logprobs and delta.finish_reason is None:
        return None
    message = pb.Delta(
        index=delta.index,
        text=delta.text,
        finish_reason=None if delta.finish_reason is None else _FINISH_REASONS[delta.finish_reason],
        stop_reason=delta.stop_reason,
        logprobs=_to_logprobs(delta.logprobs),
    )
    return pb.GenerateStreamResponse(delta=message)


def to_final(completion: Completion) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(final=to_response(completion))


def to_many_response(request_id: str, result: Completion | ServeError) -> pb.GenerateManyResponse:
    if isinstance(result, Completion):
        return pb.GenerateManyResponse(request_id=request_id, response=to_response(result))
    field = result.field if result.field is not None else ""
    error = pb.GenerateError(kind=result.kind, message=result.message, field=field)
    return pb.GenerateManyResponse(request_id=request_id, error=error)


def to_score_response(scores: Scores) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        request_id=scores.request_id,
        model=scores.model,
        candidates=[
            pb.CandidateScore(
                text=candidate.text,
                logprob=candidate.logprob,
                num_tokens=candidate.num_tokens,
                logprob_per_token=candidate.logprob_per_token,
                probability=candidate.probability,
            )
            for candidate in scores.candidates
        ],
        best=scores.best,
        usage=_to_usage(scores.usage),
        timings=_to_timings(scores.timings),
    )


def to_tokenize_response(tokenization: Tokenization) -> pb.TokenizeResponse:
    return pb.TokenizeResponse(
        token_ids=tokenization.token_ids,
        num_tokens=tokenization.num_tokens,
        unknown_tokens=tokenization.unknown_tokens,
    )


def to_model_response(card: ModelCard) -> pb.GetModelResponse:
    return pb.GetModelResponse(
        id=card.id,
        created=card.created,
        runtime=card.runtime,
        dtype=card.dtype,
        architecture=card.architecture,
        max_input_tokens=card.max_input_tokens,
        max_output_tokens=card.max_output_tokens,
        modes=[_MODE_VALUES[mode] for mode in card.modes],
    )


def _said(message: Message, name: str) -> Any:
    """The field's value, or None where the client left it out."""
    return getattr(message, name) if message.HasField(name) else None


def _prompt_fields(message: pb.GenerateRequest | pb.ScoreRequest) -> dict[str, Any]:
    """What both kinds of request say about the prompt and the model."""
    return {
        "mode": _mode(message),
        "options": tuple(message.options),
        "exemplars": tuple(_exemplars(message.exemplars)),
        **{name: _said(message, name) for name in ("instruction", "input", "exemplar_set", "num_exemplars", "model")},
    }


def _mode(message: pb.GenerateRequest | pb.ScoreRequest) -> Mode:
    if message.mode == pb.MODE_UNSPECIFIED:
        return Mode.INSTRUCTION
    # A number that this version does not know arrives as it is: proto3's enums are open.
    if message.mode not in _MODES:
        raise InvalidRequest(f"mode {message.mode} is unknown", field="mode")
    return _MODES[message.mode]


def _answer_format(message: pb.GenerateRequest) -> Literal["text", "number"]:
    if message.answer_format == pb.ANSWER_FORMAT_UNSPECIFIED:
        return "text"
    if message.answer_format not in _ANSWER_FORMATS:
        raise InvalidRequest(f"answer_format {message.answer_format} is unknown", field="answer_format")
    return _ANSWER_FORMATS[message.answer_format]


def _exemplars(messages: Iterable[pb.Exemplar]) -> Iterable[Exemplar]:
    for index, message in enumerate(messages):
        for name in ("input", "output"):
            if not message.HasField(name):
                raise InvalidRequest(f"exemplars[{index}]: {name} is required", field="exemplars")
        yield Exemplar(message.input, message.output, _said(message, "rationale"))


def _to_logprobs(logprobs: Iterable[TextLogprob]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(token_id=item.token_id, text=item.text, logprob=item.logprob, top=_to_logprobs(item.top))
        for item in logprobs
    ]


def _to_vote(vote: Vote) -> pb.Vote:
    return pb.Vote(answer=vote.answer, count=vote.count, weight=vote.weight)


def _to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        unknown_tokens=usage.unknown_tokens,
    )


def _to_timings(timings: Timings) -> pb.Timings:
    return pb.Timings(queue_ms=timings.queue_ms, first_token_ms=timings.first_token_ms, total_ms=timings.total_ms)
