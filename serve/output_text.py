"""One output of a request: its tokens as they come, its text as it may be shown, and how it ended."""

from __future__ import annotations

import math

from serve.detokenizer import IncrementalText
from serve.output import IMPOSSIBLE_LOGPROB, FinishReason, Output, TextDelta, TextLogprob, TokenDelta, TokenLogprob
from serve.prompts import cot
from serve.request import Mode, PreparedRequest
from serve.tokenizer import Tokenizer


class OutputText:
    """Token deltas of one sequence in, text deltas out.

    An output ends with the token that completes a stop string or (mode cot) shows that the answer's sentence is
    over: later tokens of the same delta are not kept, so `token_ids`, `logprobs` and usage all count up to and
    including that token, though the text ends before it.
    """

    def __init__(self, index: int, prepared: PreparedRequest, tokenizer: Tokenizer, *, shows_logprobs: bool) -> None:
        sampling = prepared.sampling
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.sum_logprob = 0.0
        self._tokenizer = tokenizer
        self._is_cot = prepared.mode is Mode.COT
        self._asks_number = prepared.answer_format == "number"
        self._min_tokens = sampling.min_tokens
        self._shows_logprobs = shows_logprobs
        self._incremental = IncrementalText(
            tokenizer.table,
            stop=sampling.stop,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        self._text = ""  # what the sequence wrote, without stop string and without anything after the answer
        self._shown = 0  # characters of it that were given out
        self._answer_is_over = False
        self._token_ids: list[int] = []
        self._logprobs: list[TextLogprob] = []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def take(self, delta: TokenDelta) -> TextDelta:
        """The text that `delta` makes certain; its `finish_reason` is set when the output has ended."""
        piece, kept = "", 0
        for token_id in delta.token_ids:
            piece += self._push(token_id)
            kept += 1
            if self._is_complete():
                self.finish_reason = FinishReason.STOP
                break
        if self.finish_reason is None and delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.error = delta.error
            piece += self._show(self._incremental.flush(), ended=True)
        logprobs: tuple[TextLogprob, ...] = ()
        if delta.logprobs:
            self.sum_logprob += math.fsum(_finite(entry.logprob) for entry in delta.logprobs[:kept])
            if self._shows_logprobs:
                logprobs = self._to_text_logprobs(delta.logprobs[:kept])
                self._logprobs += logprobs
        return TextDelta(
            index=self.index,
            text=piece,
            token_ids=delta.token_ids[:kept],
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )

    def to_output(self) -> Output:
        """The finished output; its text is what the deltas joined."""
        assert self.finish_reason is not None
        rationale = answer = None
        text = self._text
        if self._is_cot:
            parts = cot.split(text)
            rationale, answer = parts.rationale, parts.answer
            if answer is None and self._asks_number:
                answer = cot.last_number(text)
        return Output(
            index=self.index,
            text=text,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            rationale=rationale,
            answer=answer,
            logprobs=tuple(self._logprobs) if self._shows_logprobs else None,
            token_ids=tuple(self._token_ids),
        )

    @property
    def _stop_reason(self) -> str | None:
        return self._incremental.stop_reason if self.finish_reason is FinishReason.STOP else None

    def _push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        new = self._incremental.push(token_id)
        return self._show(new, ended=self._incremental.stop_reason is not None) if new else ""

    def _is_complete(self) -> bool:
        if self._incremental.stop_reason is not None:
            return True
        return self._answer_is_over and len(self._token_ids) > self._min_tokens

    def _show(self, new: str, *, ended: bool) -> str:
        """Add to the text; returns what may be shown of it: all, but nothing after the answer's sentence."""
        if self._answer_is_over:
            return ""
        self._text += new
        if self._is_cot:
            parts = cot.split(self._text, ended=ended)
            self._answer_is_over = parts.complete
            self._text = parts.text
        piece = self._text[self._shown :]
        self._shown = len(self._text)
        return piece

    def _to_text_logprobs(self, entries: tuple[TokenLogprob, ...]) -> tuple[TextLogprob, ...]:
        return tuple(to_text_logprob(entry, self._tokenizer) for entry in entries)


def to_text_logprob(entry: TokenLogprob, tokenizer: Tokenizer) -> TextLogprob:
    """With texts, and no number that the wire cannot carry."""
    return TextLogprob(
        entry.token_id,
        tokenizer.token_text(entry.token_id),
        _finite(entry.logprob),
        tuple(
            TextLogprob(token_id, tokenizer.token_text(token_id), _finite(logprob)) for token_id, logprob in entry.top
        ),
    )


def _finite(logprob: float) -> float:
    """Never NaN or infinite on the wire."""
    return max(logprob, IMPOSSIBLE_LOGPROB) if math.isfinite(logprob) else IMPOSSIBLE_LOGPROB
