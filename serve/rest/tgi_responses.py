"""The domain's results as Text Generation Inference's responses, stream events and headers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from serve.errors import EngineFailure
from serve.output import Completion, FinishReason, Output, TextDelta, TextLogprob
from serve.rest.errors import Headers
from serve.rest.json_text import Json, dump
from serve.rest.sse import EventForm
from serve.rest.text_offsets import TextOffsets
from serve.rest.tgi import TgiRequest
from serve.sampling_params import MAX_LOGPROBS, MAX_SEQUENCES, MAX_STOP_STRINGS
from serve.service import ModelCard, ResponseStream, ServiceSettings

IsSpecial = Callable[[int], bool]

EVENT_FORM = EventForm(b"data:", b"")  # as TGI writes it: no space, nothing behind the last event


class TokenPieces:
    """An output's tokens, each with what it brought to the text; the pieces joined are the text.

    A token waits while its text is not certain (a stop string may begin, bytes of a character are missing), so it
    has the same piece in a stream as in a whole response. The end token's piece is always empty.
    """

    def __init__(self, is_special: IsSpecial) -> None:
        self._is_special = is_special
        self._offsets = TextOffsets()
        self._given = 0  # characters of the text that stand in pieces
        self.text = ""

    def push(self, tokens: tuple[TextLogprob, ...], text: str, *, is_over: bool) -> list[tuple[TextLogprob, Json]]:
        """The tokens whose text is certain now, each with TGI's form of it."""
        self.text += text
        placed = self._offsets.push(tokens, text)
        if is_over:
            placed += self._offsets.flush()
        ends = [begin for _, begin in placed[1:]] + [self._offsets.position]
        if is_over:  # what is left belongs to the last token that shows
            shown = [index for index, (token, _) in enumerate(placed) if not self._is_special(token.token_id)]
            owner = shown[-1] if shown else len(placed) - 1
            ends[owner:] = [len(self.text)] * (len(placed) - owner)
        pieces = []
        for (token, _), end in zip(placed, ends, strict=False):
            piece, self._given = self.text[self._given : end], max(self._given, end)
            pieces.append((token, to_token(token, piece, self._is_special)))
        return pieces

    def remainder(self) -> Json:
        """The text that no token brought, as a token that is none."""
        piece, self._given = self.text[self._given :], len(self.text)
        return {"id": 0, "text": piece, "logprob": 0.0, "special": True}


def to_response(completion: Completion, asked: TgiRequest, is_special: IsSpecial) -> bytes:
    """
    Raises:
        EngineFailure: an output failed; TGI's schema has no word for that in a response.
    """
    for output in completion.outputs:
        check_finish_reason(output.finish_reason)
    best, *others = sorted(completion.outputs, key=lambda output: -_logprob_per_token(output))
    body: Json = {"generated_text": asked.echoed + best.text}
    if asked.details:
        body["details"] = _details(best, completion, asked, is_special)
        if others:
            body["details"]["best_of_sequences"] = [
                {"generated_text": asked.echoed + other.text, **_details(other, completion, asked, is_special)}
                for other in others
            ]
    return dump([body] if asked.as_list else body)


def to_headers(completion: Completion) -> Headers:
    """TGI's account of a whole response: milliseconds and counts."""
    timings, usage = completion.timings, completion.usage
    inference = timings.total_ms - timings.queue_ms
    numbers = {
        "x-compute-time": math.ceil(timings.total_ms / 1000),  # whole seconds, as it has it
        "x-compute-characters": sum(len(output.text) for output in completion.outputs),
        "x-total-time": round(timings.total_ms),
        "x-validation-time": 0,  # part of the queue time here
        "x-queue-time": round(timings.queue_ms),
        "x-inference-time": round(inference),
        "x-time-per-token": round(inference / max(1, usage.completion_tokens)),
        "x-prompt-tokens": usage.prompt_tokens,
        "x-generated-tokens": usage.completion_tokens,
    }
    return [(name.encode(), b"%d" % number) for name, number in numbers.items()]


class TgiEvents:
    """The events of one stream, one a token; the last has the whole text and `details`."""

    def __init__(self, stream: ResponseStream, asked: TgiRequest, is_special: IsSpecial) -> None:
        self._asked = asked
        self._is_special = is_special
        self._input_length = stream.prepared.prompt_tokens
        self._pieces = TokenPieces(is_special)
        self._num_tokens = 0
        self._num_events = 0

    def take(self, delta: TextDelta) -> Sequence[Json]:
        """
        Raises:
            EngineFailure: the output failed.
        """
        check_finish_reason(delta.finish_reason)
        self._num_tokens += len(delta.token_ids)
        is_over = delta.finish_reason is not None
        events = []
        for token, as_json in self._pieces.push(delta.logprobs, delta.text, is_over=is_over):
            self._num_events += 1
            event: Json = {"index": self._num_events, "token": as_json}
            if self._asked.request.sampling.logprobs:
                event["top_tokens"] = _top_tokens(token, self._is_special)
            events.append({**event, "generated_text": None, "details": None})
        if delta.finish_reason is not None:
            if not events:  # it ended without another token
                events.append({"index": self._num_events + 1, "token": self._pieces.remainder()})
            events[-1]["generated_text"] = self._asked.echoed + self._pieces.text
            events[-1]["details"] = {
                "finish_reason": to_finish_reason(delta.finish_reason, delta.stop_reason),
                "generated_tokens": self._num_tokens,
                "input_length": self._input_length,
                "seed": self._asked.seed,
            }
        return events

    def last(self, completion: Completion) -> Json | None:
        return None


def to_info(card: ModelCard, settings: ServiceSettings, version: str) -> bytes:
    """`GET /info`. What TGI calls the model's total is prompt and text together."""
    task = "text2text-generation" if card.is_encoder_decoder else "text-generation"
    return dump(
        {
            "model_id": card.id,
            "model_sha": None,
            "model_dtype": card.dtype,
            "model_pipeline_tag": task,
            "max_concurrent_requests": settings.max_running_sequences + settings.max_queued_requests,
            "max_best_of": MAX_SEQUENCES,
            "max_stop_sequences": MAX_STOP_STRINGS,
            "max_top_n_tokens": MAX_LOGPROBS,
            "max_input_tokens": card.max_input_tokens,
            "max_total_tokens": card.max_input_tokens + card.max_output_tokens,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": "flan-serve",
            "version": version,
            "sha": None,
            "docker_label": None,
        }
    )


def to_finish_reason(reason: FinishReason, stop_reason: str | None) -> str:
    """
    >>> to_finish_reason(FinishReason.STOP, None), to_finish_reason(FinishReason.STOP, "x")
    ('eos_token', 'stop_sequence')
    """
    if reason is FinishReason.LENGTH:
        return "length"
    return "eos_token" if stop_reason is None else "stop_sequence"


def check_finish_reason(reason: FinishReason | None) -> None:
    """
    Raises:
        EngineFailure: one that TGI's schema does not have.
    """
    if reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise EngineFailure("the output of this request failed")


def to_token(token: TextLogprob, text: str, is_special: IsSpecial) -> Json:
    return {"id": token.token_id, "text": text, "logprob": token.logprob, "special": is_special(token.token_id)}


def _top_tokens(token: TextLogprob, is_special: IsSpecial) -> list[Json]:
    return [to_token(top, top.text, is_special) for top in token.top]


def _details(output: Output, completion: Completion, asked: TgiRequest, is_special: IsSpecial) -> Json:
    tokens = () if output.logprobs is None else output.logprobs
    pieces = TokenPieces(is_special).push(tokens, output.text, is_over=True)
    prefill = completion.prompt_logprobs[0] if completion.prompt_logprobs else ()
    details: Json = {
        "finish_reason": to_finish_reason(output.finish_reason, output.stop_reason),
        "generated_tokens": len(output.token_ids),
        "seed": asked.seed,
        "prefill": [
            # nothing gives the first token's probability
            {"id": token.token_id, "text": token.text, "logprob": token.logprob if index > 0 else None}
            for index, token in enumerate(prefill)
        ],
        "tokens": [as_json for _, as_json in pieces],
    }
    if asked.request.sampling.logprobs:
        details["top_tokens"] = [_top_tokens(token, is_special) for token, _ in pieces]
    return details


def _logprob_per_token(output: Output) -> float:
    logprobs = () if output.logprobs is None else output.logprobs
    return sum(token.logprob for token in logprobs) / max(1, len(logprobs))
