"""The domain's results as OpenAI's responses and stream chunks, completions and chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

from serve.errors import EngineFailure
from serve.output import Completion, FinishReason, Output, TextDelta, TextLogprob, Usage
from serve.rest.codec import to_usage
from serve.rest.json_text import Json, dump_with
from serve.rest.openai import OpenAIRequest
from serve.rest.text_offsets import Placed, TextOffsets
from serve.service import ResponseStream

# (index of the output) -> the text of the prompt that stands before it; "" without echo
Echo = Callable[[int], str]
_BYTES_TEXT = re.compile(r"bytes:(\\x[0-9a-f]{2})+")


def to_completion_response(completion: Completion, echo: Echo, *, only_prompt: bool = False) -> bytes:
    """
    Raises:
        EngineFailure: an output failed; OpenAI's schema has no word for that in a response.
    """
    if only_prompt:
        outputs = tuple(
            replace(output, text="", logprobs=(), finish_reason=FinishReason.LENGTH, stop_reason=None)
            if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            else output
            for output in completion.outputs
        )
        completion = replace(completion, outputs=outputs, usage=replace(completion.usage, completion_tokens=0))
    return _to_response(
        completion, "cmpl", "text_completion", lambda output: _completion_choice(output, completion, echo)
    )


def to_chat_response(completion: Completion) -> bytes:
    """
    Raises:
        EngineFailure: as above.
    """
    return _to_response(completion, "chatcmpl", "chat.completion", _chat_choice)


class _Chunks:
    """The chunks of one stream. Deltas without text are kept until there is some: a chunk means that a token came."""

    prefix: ClassVar[str]
    kind: ClassVar[str]

    def __init__(self, stream: ResponseStream, asked: OpenAIRequest) -> None:
        prompts = stream.prepared.prompts
        self._asked = asked
        self._head: Json = {
            "id": f"{self.prefix}-{stream.request_id}",
            "object": self.kind,
            "created": stream.created,
            "model": stream.model,
        }
        self._usage = Usage(stream.prepared.prompt_tokens, 0, sum(prompt.unknown_tokens for prompt in prompts))
        self._begun: set[int] = set()

    def take(self, delta: TextDelta) -> Sequence[Json]:
        """
        Raises:
            EngineFailure: the output failed.
        """
        _check_finish_reason(delta.finish_reason)
        self._usage = replace(self._usage, completion_tokens=self._usage.completion_tokens + len(delta.token_ids))
        if not self._has_text(delta):
            return ()
        choice = self._choice(delta, is_first=delta.index not in self._begun)
        self._begun.add(delta.index)
        choice["finish_reason"] = None if delta.finish_reason is None else delta.finish_reason.value
        choice["stop_reason"] = delta.stop_reason
        chunk: Json = {**self._head, "choices": [choice]}
        if self._asked.continuous_usage:
            chunk["usage"] = to_usage(self._usage)
        elif self._asked.include_usage:
            chunk["usage"] = None
        return (chunk,)

    def last(self, completion: Completion) -> Json | None:
        """The chunk behind all others: with the usage where it is asked for, with the prompt in a debug request."""
        if not self._asked.include_usage and completion.prompt is None:
            return None
        chunk: Json = {**self._head, "choices": []}
        if self._asked.include_usage:
            chunk["usage"] = to_usage(completion.usage)
        if completion.prompt is not None:
            chunk["prompt"] = completion.prompt
        return chunk

    def _has_text(self, delta: TextDelta) -> bool:
        """Take in the delta's tokens; whether its text is to be sent."""
        raise NotImplementedError

    def _choice(self, delta: TextDelta, *, is_first: bool) -> Json:
        raise NotImplementedError


class CompletionChunks(_Chunks):
    prefix, kind = "cmpl", "text_completion"

    def __init__(self, stream: ResponseStream, asked: OpenAIRequest, echo: Echo) -> None:
        super().__init__(stream, asked)
        self._stream = stream
        self._echo = echo
        self._offsets = [TextOffsets(len(echo(index))) for index in range(stream.prepared.num_sequences)]
        self._placed: list[Placed] = [[] for _ in self._offsets]

    def _has_text(self, delta: TextDelta) -> bool:
        self._placed[delta.index] += self._offsets[delta.index].push(delta.logprobs, delta.text)
        return bool(delta.text) or delta.finish_reason is not None

    def _choice(self, delta: TextDelta, *, is_first: bool) -> Json:
        index = delta.index
        placed, self._placed[index] = self._placed[index], []
        if delta.finish_reason is not None:
            placed += self._offsets[index].flush()
        shown = "" if self._asked.only_prompt else delta.text
        placed = [] if self._asked.only_prompt else placed
        prompt = self._prompt_of(index) if is_first else []
        text = self._echo(index) + shown if is_first else shown
        logprobs = _completion_logprobs(prompt + placed, has_prompt=bool(prompt)) if prompt + placed else None
        return {"index": index, "text": text, "logprobs": logprobs}

    def _prompt_of(self, index: int) -> Placed:
        """The tokens of the prompt that stands before an output, where they were asked for."""
        found = self._stream.prompt_logprobs
        if not found:
            return []
        n = self._stream.prepared.num_sequences // len(found)
        offsets = TextOffsets()
        return offsets.push(found[index // n], self._echo(index)) + offsets.flush()


class ChatChunks(_Chunks):
    prefix, kind = "chatcmpl", "chat.completion.chunk"

    def __init__(self, stream: ResponseStream, asked: OpenAIRequest) -> None:
        super().__init__(stream, asked)
        self._waiting: list[list[TextLogprob]] = [[] for _ in range(stream.prepared.num_sequences)]

    def _has_text(self, delta: TextDelta) -> bool:
        self._waiting[delta.index] += delta.logprobs
        return bool(delta.text) or delta.finish_reason is not None

    def _choice(self, delta: TextDelta, *, is_first: bool) -> Json:
        index = delta.index
        logprobs, self._waiting[index] = self._waiting[index], []
        message: Json = {"role": "assistant"} if is_first else {}
        message["content"] = delta.text
        return {"index": index, "delta": message, "logprobs": _chat_logprobs(logprobs) if logprobs else None}


def _check_finish_reason(reason: FinishReason | None) -> None:
    """
    Raises:
        EngineFailure: one that OpenAI's schema does not have.
    """
    if reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise EngineFailure("an output of this request failed")


def _to_response(completion: Completion, prefix: str, kind: str, to_choice: Callable[[Output], Json]) -> bytes:
    for output in completion.outputs:
        _check_finish_reason(output.finish_reason)
    body: Json = {
        "id": f"{prefix}-{completion.request_id}",
        "object": kind,
        "created": completion.created,
        "model": completion.model,
        "usage": to_usage(completion.usage),
    }
    if completion.prompt is not None:
        body["prompt"] = completion.prompt
    return dump_with(body, "choices", (to_choice(output) for output in completion.outputs))


def _completion_choice(output: Output, completion: Completion, echo: Echo) -> Json:
    logprobs = None
    if output.logprobs is not None and completion.prompt_logprobs:
        n = len(completion.outputs) // len(completion.prompt_logprobs)
        prompt = completion.prompt_logprobs[output.index // n]
        logprobs = _echoed_logprobs(prompt, output.logprobs, echo(output.index), output.text)
    elif output.logprobs is not None:
        offsets = TextOffsets(len(echo(output.index)))
        logprobs = _completion_logprobs(offsets.push(output.logprobs, output.text) + offsets.flush())
    return {
        "index": output.index,
        "text": echo(output.index) + output.text,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason.value,
        "stop_reason": output.stop_reason,
    }


def _chat_choice(output: Output) -> Json:
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": None if output.logprobs is None else _chat_logprobs(output.logprobs),
        "finish_reason": output.finish_reason.value,
        "stop_reason": output.stop_reason,
    }


def _completion_logprobs(placed: Placed, *, has_prompt: bool = False) -> Json:
    """`has_prompt`: the first token is a prompt's first, which has no log-probability."""
    tokens = [token for token, _ in placed]
    logprobs: list[float | None] = [token.logprob for token in tokens]
    tops: list[dict[str, float] | None] = [_by_text(token) for token in tokens]
    if has_prompt:
        logprobs[0] = tops[0] = None
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": [offset for _, offset in placed],
    }


def _echoed_logprobs(prompt: tuple[TextLogprob, ...], made: tuple[TextLogprob, ...], echoed: str, text: str) -> Json:
    """Arrays over prompt and text. Nothing comes before the prompt's first token, so that has null."""
    offsets = TextOffsets()
    return _completion_logprobs(
        offsets.push((*prompt, *made), echoed + text) + offsets.flush(), has_prompt=bool(prompt)
    )


def _by_text(token: TextLogprob) -> dict[str, float]:
    """The token itself, which clients look up, and the alternatives; best first."""
    logprobs = {token.text: token.logprob}
    for top in token.top:
        logprobs.setdefault(top.text, top.logprob)  # several tokens may look alike
    return dict(sorted(logprobs.items(), key=lambda pair: -pair[1]))


def _chat_logprobs(tokens: Iterable[TextLogprob]) -> Json:
    return {
        "content": [{**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]} for token in tokens]
    }


def _chat_token(token: TextLogprob) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(_to_bytes(token.text))}


def _to_bytes(text: str) -> bytes:
    """A token's bytes; one that is no text by itself is shown by them.

    >>> _to_bytes("\\u00e9"), _to_bytes(r"bytes:\\xf0\\x9f")
    (b'\\xc3\\xa9', b'\\xf0\\x9f')
    """
    if _BYTES_TEXT.fullmatch(text):
        return bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))
    return text.encode()
