"""Between the native JSON and the domain's requests and results. Field names are the same on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from serve.errors import InvalidRequest
from serve.output import Completion, Output, Scores, TextDelta, TextLogprob, Timings, Tokenization, Usage, Vote
from serve.request import Exemplar, GenerateRequest, Mode, ScoreRequest, is_request_id
from serve.rest.fields import parse
from serve.rest.json_text import Json, dump, dump_with
from serve.rest.request_fields import GENERATE_FIELDS, SCORE_FIELDS, TOKENIZE_FIELDS
from serve.sampling_params import SamplingFields
from serve.service import ModelCard

_SAMPLING = tuple(field.name for field in fields(SamplingFields))


def to_request(body: Json, *, timeout_seconds: float | None) -> GenerateRequest:
    """The request as asked.

    Raises:
        InvalidRequest: naming the field.
    """
    said = parse(GENERATE_FIELDS, body)
    sampling = SamplingFields(**{name: said.pop(name) for name in _SAMPLING if name in said})
    return GenerateRequest(**_with_prompt_types(said), sampling=sampling, timeout_seconds=timeout_seconds)


def to_score_request(body: Json, *, timeout_seconds: float | None) -> ScoreRequest:
    """The scoring request as asked.

    Raises:
        InvalidRequest: naming the field.
    """
    return ScoreRequest(**_with_prompt_types(parse(SCORE_FIELDS, body)), timeout_seconds=timeout_seconds)


def to_tokenize_arguments(body: Json) -> dict[str, Any]:
    """What `Service.tokenize` takes.

    Raises:
        InvalidRequest: naming the field.
    """
    return parse(TOKENIZE_FIELDS, body)


def to_response(completion: Completion) -> bytes:
    return dump_with(_whole(completion), "outputs", (_output(output) for output in completion.outputs))


class NativeFrames:
    """The data frames of a native stream."""

    def take(self, delta: TextDelta) -> Sequence[Json]:
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return ()
        frame: Json = {"index": delta.index, "text": delta.text}
        if delta.logprobs:
            frame["logprobs"] = to_logprobs(delta.logprobs)
        if delta.finish_reason is not None:
            frame["finish_reason"] = delta.finish_reason.value
        if delta.stop_reason is not None:
            frame["stop_reason"] = delta.stop_reason
        return (frame,)

    def last(self, completion: Completion) -> Json:
        """What the whole response has beside its outputs.

        In mode cot the outputs are there too, because only the whole text shows where a rationale ends and what the
        answer is; and `rationale` is the one that led to the answer.
        """
        frame = _whole(completion)
        if completion.mode == Mode.COT:
            matching = [output.rationale for output in completion.outputs if output.answer == completion.answer]
            frame["rationale"] = matching[0] if matching else None
            frame["outputs"] = [_output(replace(output, logprobs=None)) for output in completion.outputs]
        return frame


def to_score_response(scores: Scores) -> bytes:
    body = {
        "request_id": scores.request_id,
        "model": scores.model,
        "candidates": [
            {
                "text": candidate.text,
                "logprob": candidate.logprob,
                "num_tokens": candidate.num_tokens,
                "logprob_per_token": candidate.logprob_per_token,
                "probability": candidate.probability,
            }
            for candidate in scores.candidates
        ],
        "best": scores.best,
        "usage": to_usage(scores.usage),
        "timings": _timings(scores.timings),
    }
    return dump(body)


def to_tokenize_response(tokenization: Tokenization) -> bytes:
    return dump(
        {
            "token_ids": tokenization.token_ids,
            "num_tokens": tokenization.num_tokens,
            "unknown_tokens": tokenization.unknown_tokens,
        }
    )


def to_models_response(card: ModelCard, names: Iterable[str]) -> bytes:
    return dump({"object": "list", "data": [to_model(card, name) for name in names]})


def to_model(card: ModelCard, name: str) -> Json:
    """One entry of OpenAI's model list, with our fields. `max_model_len` is what vLLM's clients look for."""
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "flan-serve",
        "root": card.root,
        "parent": None,
        "max_model_len": card.max_input_tokens + card.max_output_tokens,
        "runtime": card.runtime,
        "dtype": card.dtype,
        "architecture": card.architecture,
        "max_input_tokens": card.max_input_tokens,
        "max_output_tokens": card.max_output_tokens,
        "modes": card.modes,
    }


def to_usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "unknown_tokens": usage.unknown_tokens,
    }


def to_logprobs(logprobs: Iterable[TextLogprob]) -> list[Json]:
    return [
        {
            "token_id": item.token_id,
            "text": item.text,
            "logprob": item.logprob,
            "top": [{"token_id": top.token_id, "text": top.text, "logprob": top.logprob} for top in item.top],
        }
        for item in logprobs
    ]


def _with_prompt_types(said: Json) -> dict[str, Any]:
    """The parsed fields as the request classes have them."""
    if "mode" in said:
        said["mode"] = Mode(said["mode"])
    for name in ("options", "exemplars"):
        if name in said:
            said[name] = tuple(said[name])
    if "exemplars" in said:
        said["exemplars"] = tuple(Exemplar(**exemplar) for exemplar in said["exemplars"])
    if "request_id" in said and not is_request_id(said["request_id"]):
        raise InvalidRequest("request_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -", field="request_id")
    return said


def _whole(completion: Completion) -> Json:
    """What a response says beside its outputs."""
    body: Json = {
        "request_id": completion.request_id,
        "model": completion.model,
        "mode": completion.mode,
        "created": completion.created,
        "max_tokens": completion.max_tokens,
        "exemplars_used": completion.exemplars_used,
        "exemplars_dropped": completion.exemplars_dropped,
        "usage": to_usage(completion.usage),
        "timings": _timings(completion.timings),
    }
    if completion.mode == Mode.COT:
        body["answer"] = completion.answer
    if completion.votes:
        body["votes"] = [_vote(vote) for vote in completion.votes]
    if completion.tie is not None:
        body["tie"] = completion.tie
    if completion.prompt is not None:
        body["prompt"] = completion.prompt
    if completion.stop is not None:
        body["stop"] = completion.stop
    return body


def _output(output: Output) -> Json:
    body: Json = {"index": output.index, "text": output.text, "finish_reason": output.finish_reason.value}
    if output.stop_reason is not None:
        body["stop_reason"] = output.stop_reason
    if output.rationale is not None:  # mode cot; its answer may be null all the same
        body["rationale"] = output.rationale
        body["answer"] = output.answer
    if output.logprobs is not None:
        body["logprobs"] = to_logprobs(output.logprobs)
    return body


def _vote(vote: Vote) -> Json:
    return {"answer": vote.answer, "count": vote.count, "weight": vote.weight}


def _timings(timings: Timings) -> Json:
    first = timings.first_token_ms
    return {
        "queue_ms": round(timings.queue_ms, 3),
        "first_token_ms": None if first is None else round(first, 3),
        "total_ms": round(timings.total_ms, 3),
    }
