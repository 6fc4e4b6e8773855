"""The answer to one accepted request: waits its turn, runs, turns tokens into text, folds itself into a Completion.

    ticket granted ──> runtime.generate ──> TokenDelta ──> OutputText ──> TextDelta ──> (the caller) ──> completion

The client's leaving, the deadline and the engine's death are events like any other: each ends the stream once
(`_end`), which frees the slots, tells the runtime and wakes whoever waits for the next delta.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from serve.admission import Ticket
from serve.errors import Cancelled, DeadlineExceeded, EngineFailure, ServeError
from serve.metrics import Metrics, RequestTracker, outcome_of
from serve.output import (
    Completion,
    FinishReason,
    Output,
    TextDelta,
    TextLogprob,
    Timings,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from serve.output_text import OutputText, to_text_logprob
from serve.request import Mode, PreparedRequest
from serve.runtimes.base import PromptScorer, Runtime, TokenStream
from serve.tokenizer import Tokenizer
from serve.voting import Ballot, vote

ENGINE_DEAD = "the engine has failed; the server must be restarted"
_CLOCK_TOLERANCE_SECONDS = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What all streams of a service share."""

    runtime: Runtime
    tokenizer: Tokenizer
    metrics: Metrics
    model: str


class ResponseStream:
    """An async iterator of TextDelta; ends when every output has finished. Made by `Service.open`.

    Cancelling a pending `__anext__` loses nothing (iterate on, or `aclose`).
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        context: StreamContext,
        ticket: Ticket,
        tracker: RequestTracker,
        *,
        shows_logprobs: bool,
        on_end: Callable[[ResponseStream], None],
    ) -> None:
        self.prepared = prepared
        self.request_id = prepared.request_id
        self.model = context.model
        self.created = int(time.time())
        self._context = context
        self._ticket = ticket
        self._tracker = tracker
        self._on_end = on_end
        self._outputs = [
            OutputText(index, prepared, context.tokenizer, shows_logprobs=shows_logprobs)
            for index in range(prepared.num_sequences)
        ]
        self._unfinished = len(self._outputs)
        self._tokens: TokenStream | None = None
        self.prompt_logprobs: tuple[tuple[TextLogprob, ...], ...] = ()  # there before the first delta
        self._last_token_at = [0.0] * len(self._outputs)
        self._completion: Completion | None = None
        self._error: ServeError | None = None
        self._is_over = False
        self._is_reported = False  # the error was raised once; later calls end quietly
        self._wait: asyncio.Timeout | None = None
        self._closing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if prepared.timeout_seconds is not None:
            left = prepared.timeout_seconds - tracker.elapsed()
            self._timer = asyncio.get_running_loop().call_later(max(left, 0.0), self._expire)

    def __aiter__(self) -> ResponseStream:
        return self

    async def __anext__(self) -> TextDelta:
        """
        Raises:
            DeadlineExceeded, EngineFailure, Unavailable (a drain refused it in the queue), Cancelled (closed meanwhile)
        """
        if self._is_over:
            self._raise_end()
        try:
            return await self._interruptible()
        except TimeoutError as error:
            self._end(EngineFailure("internal error"))  # no effect where `_end` has set the alarm off
            self._raise_end(error)
        except ServeError as error:
            self._end(to_client_error(error, self._context.runtime))
            self._raise_end(error)
        except StopAsyncIteration:
            self._end(EngineFailure("the engine ended a request before its last token"))
            self._raise_end()
        except Exception as error:
            _log.exception("request %s failed", self.request_id)
            self._end(EngineFailure("internal error"))
            self._raise_end(error)

    @property
    def completion(self) -> Completion:
        """The folded whole; there after the last delta."""
        if self._completion is None:
            raise RuntimeError("the completion is there after the last delta")
        return self._completion

    async def aclose(self) -> None:
        """The client has gone, or has all it wanted: slots are free before the engine's next step. Idempotent."""
        self._end(departure(self._tracker, self.prepared.timeout_seconds))
        if self._wait is None:
            self._is_reported = True
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def interrupt(self, error: ServeError) -> None:
        """End the stream with `error` (the engine died, the server exits)."""
        self._end(error)

    async def _interruptible(self) -> TextDelta:
        """`_next`, with an alarm that `_end` sets off."""
        try:
            async with asyncio.timeout(None) as self._wait:
                return await self._next()
        finally:
            self._wait = None

    async def _next(self) -> TextDelta:
        if self._tokens is None or not self._ticket.has_begun:
            await self._begin()
        if self.prepared.prompt_logprobs and not self.prompt_logprobs:
            self.prompt_logprobs = await self._score_prompts()
        assert self._tokens is not None
        while True:
            delta = await self._tokens.__anext__()
            output = self._outputs[delta.index]
            if not output.finished:
                return self._take(output, delta)

    async def _begin(self) -> None:
        """Wait in the queue, then until the engine has begun the request."""
        if self._tokens is None:
            await self._ticket.granted()
            self._tokens = self._context.runtime.generate(self._runtime_request())
        begun = await self._tokens.started()
        self._ticket.begin()
        metrics, tracker = self._context.metrics, self._tracker
        # A request that joins a step that has begun did not wait.
        tracker.queue_seconds = max(0.0, begun - tracker.started)
        tracker.prompt_tokens = self.prepared.prompt_tokens
        metrics.request_queue_time.observe(tracker.queue_seconds)
        metrics.prompt_tokens.inc(self.prepared.prompt_tokens)
        metrics.unknown_tokens.inc(self._unknown_tokens)
        metrics.exemplars_dropped.inc(self.prepared.exemplars_dropped)

    async def _score_prompts(self) -> tuple[tuple[TextLogprob, ...], ...]:
        """
        Raises:
            EngineFailure
        """
        runtime, count = self._context.runtime, self.prepared.sampling.logprobs
        if not isinstance(runtime, PromptScorer):
            raise EngineFailure("this runtime gives no log-probabilities of a prompt")
        tasks = [
            asyncio.ensure_future(
                runtime.prompt_logprobs(self.request_id, prompt.token_ids, 0 if count is None else count)
            )
            for prompt in self.prepared.prompts
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:  # when one fails or the client leaves, the others end, too
            for task in tasks:
                task.cancel()
        tokenizer = self._context.tokenizer
        firsts = [TokenLogprob(prompt.token_ids[0], 0.0) for prompt in self.prepared.prompts]
        return tuple(
            tuple(to_text_logprob(entry, tokenizer) for entry in (first, *entries))
            for first, entries in zip(firsts, found, strict=True)
        )

    def _runtime_request(self) -> PreparedRequest:
        """Votes are weighed by log-probability, so samples always need them."""
        sampling = self.prepared.sampling
        if self.prepared.samples == 1 or sampling.logprobs is not None:
            return self.prepared
        return replace(self.prepared, sampling=replace(sampling, logprobs=0))

    def _take(self, output: OutputText, delta: TokenDelta) -> TextDelta:
        text = output.take(delta)
        self._observe(output.index, len(text.token_ids))
        if text.finish_reason is not None:
            self._unfinished -= 1
            if delta.finish_reason is None:  # ended here, by a stop string or after the answer
                assert self._tokens is not None
                self._tokens.finish(output.index)
            if self._unfinished == 0:
                self._complete()
            else:
                self._ticket.shrink(self._unfinished)
        return text

    def _observe(self, index: int, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        metrics, tracker, now = self._context.metrics, self._tracker, time.monotonic()
        metrics.generation_tokens.inc(num_tokens)
        tracker.completion_tokens += num_tokens
        if tracker.first_token_seconds is None:
            tracker.first_token_seconds = now - tracker.started
            metrics.time_to_first_token.observe(tracker.first_token_seconds)
        if self._last_token_at[index] > 0:
            gap = (now - self._last_token_at[index]) / num_tokens
            for _ in range(num_tokens):
                metrics.inter_token_latency.observe(gap)
        self._last_token_at[index] = now

    def _complete(self) -> None:
        """Every output has finished.

        Raises:
            EngineFailure: not one of them is whole.
        """
        errors = [output.error for output in self._outputs if output.finish_reason is FinishReason.ERROR]
        if len(errors) == len(self._outputs):
            raise EngineFailure(errors[0] if errors[0] is not None else "generation failed")
        outputs = tuple(output.to_output() for output in self._outputs)
        self._tracker.facts.finish_reasons = tuple(output.finish_reason.value for output in outputs)
        self._tracker.finish(outcome_of(output.finish_reason for output in outputs))
        self._completion = self._fold(outputs)
        self._end(None)

    def _fold(self, outputs: tuple[Output, ...]) -> Completion:
        prepared, tracker = self.prepared, self._tracker
        completion = Completion(
            request_id=self.request_id,
            model=self.model,
            mode=prepared.mode.value,
            created=self.created,
            outputs=outputs,
            max_tokens=prepared.sampling.max_tokens,
            usage=Usage(prepared.prompt_tokens, tracker.completion_tokens, self._unknown_tokens),
            timings=Timings(
                queue_ms=1000 * (0.0 if tracker.queue_seconds is None else tracker.queue_seconds),
                first_token_ms=None if tracker.first_token_seconds is None else 1000 * tracker.first_token_seconds,
                total_ms=1000 * tracker.elapsed(),
            ),
            exemplars_used=prepared.exemplars_used,
            exemplars_dropped=prepared.exemplars_dropped,
            prompt_logprobs=self.prompt_logprobs,
        )
        if prepared.mode is Mode.COT:
            completion = self._with_answer(completion)
        if prepared.debug:
            texts = [prompt.text for prompt in prepared.prompts if prompt.text is not None]
            completion = replace(completion, prompt="\n\n".join(texts) if texts else None, stop=prepared.sampling.stop)
        return completion

    def _with_answer(self, completion: Completion) -> Completion:
        if self.prepared.samples == 1:
            return replace(completion, answer=completion.outputs[0].answer)
        ballots = [
            Ballot(output.index, output.answer, self._outputs[output.index].sum_logprob)
            for output in completion.outputs
            if output.finish_reason is not FinishReason.ERROR
        ]
        result = vote(ballots)
        return replace(completion, answer=result.answer, votes=result.votes, tie=result.tie)

    @property
    def _unknown_tokens(self) -> int:
        return sum(prompt.unknown_tokens for prompt in self.prepared.prompts)

    def _expire(self) -> None:
        self._end(out_of_time())

    def _end(self, error: ServeError | None) -> None:
        """The one way out: free the slots, tell the runtime, wake the reader. The first call decides how it ended."""
        if self._is_over:
            return
        self._is_over = True
        self._error = error
        if error is not None:
            self._tracker.fail(error)
        if self._timer is not None:
            self._timer.cancel()
        self._ticket.leave()
        if self._tokens is not None:
            self._closing = asyncio.get_running_loop().create_task(self._close_tokens(self._tokens))
        if self._wait is not None:
            self._wait.reschedule(asyncio.get_running_loop().time())
        self._on_end(self)

    async def _close_tokens(self, tokens: TokenStream) -> None:
        try:
            await tokens.aclose()
        except Exception:
            _log.exception("closing request %s failed", self.request_id)

    def _raise_end(self, cause: BaseException | None = None) -> NoReturn:
        if self._error is None or self._is_reported:
            raise StopAsyncIteration
        self._is_reported = True
        raise self._error from (None if cause is self._error else cause)


def to_client_error(error: ServeError, runtime: Runtime) -> ServeError:
    """The error as clients may read it: a dead engine's own words (paths, tensors) are for the log."""
    if isinstance(error, EngineFailure) and runtime.health() is not None:
        return EngineFailure(ENGINE_DEAD)
    return error


def out_of_time() -> DeadlineExceeded:
    return DeadlineExceeded("the request's time ran out")


def departure(tracker: RequestTracker, timeout_seconds: float | None) -> ServeError:
    """What it counts as that the client has gone: a gRPC client's own clock runs out a moment before ours."""
    if timeout_seconds is not None and tracker.elapsed() >= timeout_seconds - _CLOCK_TOLERANCE_SECONDS:
        return out_of_time()
    return Cancelled("the client has gone")
