"""One accepted scoring request: waits its turn, runs once, and its sums become a distribution over the candidates."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from serve.admission import Ticket
from serve.errors import EngineFailure, ServeError
from serve.metrics import RequestTracker
from serve.output import IMPOSSIBLE_LOGPROB, CandidateScore, Scores, Timings, Usage
from serve.request import PreparedScore
from serve.response_stream import StreamContext, out_of_time, to_client_error


class ScoreCall:
    """Runs one scoring request; the twin of ResponseStream. `run` is awaited once."""

    def __init__(
        self,
        prepared: PreparedScore,
        context: StreamContext,
        ticket: Ticket,
        tracker: RequestTracker,
        *,
        on_end: Callable[[ScoreCall], None],
    ) -> None:
        self._prepared = prepared
        self._context = context
        self._ticket = ticket
        self._tracker = tracker
        self._on_end = on_end
        self._alarm: asyncio.Timeout | None = None
        self._error: ServeError | None = None

    async def run(self) -> Scores:
        """
        Raises:
            DeadlineExceeded, EngineFailure, Unavailable (a drain refused it in the queue)
        """
        seconds = self._prepared.timeout_seconds
        left = None if seconds is None else seconds - self._tracker.elapsed()
        try:
            async with asyncio.timeout(left) as self._alarm:
                await self._ticket.granted()
                self._begin()
                sums = await self._context.runtime.score(self._prepared)
            return self._to_scores(sums)
        except TimeoutError as error:
            if self._alarm is None or not self._alarm.expired():
                raise EngineFailure("internal error") from error
            raise (out_of_time() if self._error is None else self._error) from None
        except EngineFailure as error:
            raise to_client_error(error, self._context.runtime) from error
        finally:
            self._ticket.leave()
            self._on_end(self)

    def interrupt(self, error: ServeError) -> None:
        """End the call with `error` (the engine died, the server exits)."""
        self._error = error
        if self._alarm is not None:
            self._alarm.reschedule(asyncio.get_running_loop().time())

    def _begin(self) -> None:
        self._ticket.begin()
        metrics, tracker, prompt = self._context.metrics, self._tracker, self._prepared.prompt
        tracker.queue_seconds = tracker.elapsed()
        tracker.prompt_tokens = len(prompt.token_ids)
        metrics.request_queue_time.observe(tracker.queue_seconds)
        metrics.prompt_tokens.inc(tracker.prompt_tokens)
        metrics.unknown_tokens.inc(prompt.unknown_tokens)

    def _to_scores(self, sums: Sequence[tuple[float, int]]) -> Scores:
        """No token was generated, so usage counts the prompt only."""
        prepared, tracker = self._prepared, self._tracker
        candidates, best = to_candidate_scores(prepared.candidates, sums)
        usage = Usage(len(prepared.prompt.token_ids), 0, prepared.prompt.unknown_tokens)
        queue_ms = 1000 * (0.0 if tracker.queue_seconds is None else tracker.queue_seconds)
        timings = Timings(queue_ms=queue_ms, total_ms=1000 * tracker.elapsed())
        return Scores(prepared.request_id, self._context.model, candidates, best, usage, timings)


def to_candidate_scores(
    texts: Sequence[str], sums: Sequence[tuple[float, int]]
) -> tuple[tuple[CandidateScore, ...], int]:
    """Scores in the candidates' order, and the index of the best (of equals the first).

    Args:
        sums: (summed log-probability, number of tokens) of each candidate. The probability is the softmax of the
            sums; a sum that is not finite counts as impossible.

    >>> scores, best = to_candidate_scores(["yes", "no"], [(-1.0, 2), (-3.0, 2)])
    >>> best, round(scores[0].probability, 2), scores[1].logprob_per_token
    (0, 0.88, -1.5)
    """
    logprobs = [logprob if math.isfinite(logprob) else IMPOSSIBLE_LOGPROB for logprob, _ in sums]
    top = max(logprobs)
    shares = [math.exp(logprob - top) for logprob in logprobs]
    total = math.fsum(shares)
    scores = tuple(
        CandidateScore(text, logprob, num_tokens, share / total)
        for text, logprob, (_, num_tokens), share in zip(texts, logprobs, sums, shares, strict=True)
    )
    return scores, logprobs.index(top)
