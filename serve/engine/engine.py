"""Continuous batching for T5: token ids in, token ids out, one step at a time.

    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    engine = make_engine(model, EngineSettings())
    engine.add("r1", [(8774, 1)], SamplingParams(max_tokens=20))
    while engine.has_work:
        for delta in engine.step().deltas["r1"]: ...

Synchronous, for one thread. It knows no clock, no client and no text. A fault of one request ends that request (its
prompt cannot be encoded, its logits are not finite, its candidates cannot be scored); an exception out of `step` is a
fault of the whole engine, after which it must not be used again.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from serve.engine.config import EngineSettings
from serve.engine.runner import Runner
from serve.engine.sampler import Sampled
from serve.engine.scheduler import Scheduler, StepPlan
from serve.engine.sequence import Prompt, ScoreJob, Sequence, TokenIds
from serve.engine.step_output import EngineStats, ScoreResult, StepOutput
from serve.output import FinishReason, TokenDelta, TokenLogprob
from serve.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class Engine:
    """Requests in progress and the step that drives them all."""

    def __init__(
        self,
        runner: Runner[Any],
        settings: EngineSettings,
        *,
        vocab_size: int,
        eos_token_id: int,
        self_bytes_per_token: int,
        cross_bytes_per_token: int,
    ) -> None:
        self._runner = runner
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id
        self.scheduler = Scheduler(
            settings, self_bytes_per_token=self_bytes_per_token, cross_bytes_per_token=cross_bytes_per_token
        )
        self._sequences: dict[str, dict[int, Sequence]] = {}  # request -> its unfinished sequences by index
        self._jobs: dict[str, ScoreJob] = {}
        self._ages = itertools.count()
        self._refused = StepOutput()  # requests that end before they begin, told with the next step
        self._changed = False  # something happened that the next step's stats should show

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        return self.scheduler.has_work or self._changed

    def add(self, request_id: str, prompts: SequenceOf[TokenIds], params: SamplingParams) -> None:
        """Queue `len(prompts) * params.n` sequences. One that can never run ends with an error in the next step.

        Raises:
            ValueError: the request id is in use.
        """
        self._check_unused(request_id)
        self._changed = True
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequences = self._sequences.setdefault(request_id, {})
        for number, prompt_ids in enumerate(prompts):
            # Unseeded prompts of one request differ even when they are equal; seeded ones equal themselves alone.
            prompt_seed = seed + number if params.seed is None else seed
            for index in range(number * params.n, (number + 1) * params.n):
                sequence = Sequence(request_id, index, tuple(prompt_ids), params, prompt_seed, next(self._ages))
                sequences[index] = sequence
        for sequence in list(sequences.values()):
            problem = self._problem(sequence.prompt_ids, params.max_tokens)
            if problem is None:
                self.scheduler.add(sequence)
            else:
                self._end(self._refused, sequence, FinishReason.ERROR, error=problem)

    def add_score(self, request_id: str, prompt_ids: TokenIds, candidates: SequenceOf[TokenIds]) -> None:
        """Queue the scoring of `candidates` (each ends in EOS) after one prompt.

        Raises:
            ValueError: the request id is in use.
        """
        self._check_unused(request_id)
        self._changed = True
        problem = self._problem(prompt_ids, 0)
        for candidate in candidates:
            problem = problem or self._problem(candidate, 0, what="candidate")
        if problem is not None:
            self._refused.scores[request_id] = ScoreResult(error=problem)
        elif not candidates:
            self._refused.scores[request_id] = ScoreResult()
        else:
            job = ScoreJob(request_id, tuple(prompt_ids), tuple(candidates), next(self._ages))
            self._jobs[request_id] = job
            self.scheduler.add(job)

    def abort(self, request_id: str) -> None:
        """End all of a request, silently; its room is free at once. Unknown ids are ignored: it may have ended."""
        self._changed = True
        for sequence in self._sequences.pop(request_id, {}).values():
            self.scheduler.remove(sequence)
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self.scheduler.remove(job)
        self._refused.deltas.pop(request_id, None)
        self._refused.scores.pop(request_id, None)
        self.scheduler.forget_request(request_id)

    def finish(self, request_id: str, index: int) -> None:
        """End one sequence, silently; its room is free at once. Unknown ones are ignored."""
        self._changed = True
        sequences = self._sequences.get(request_id, {})
        sequence = sequences.pop(index, None)
        if sequence is None:
            return
        self.scheduler.remove(sequence)
        if not sequences:
            del self._sequences[request_id]
            self.scheduler.forget_request(request_id)

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """Plan, run, update. Any exception is the engine's end."""
        output, self._refused = self._refused, StepOutput()
        plan = self.scheduler.plan()
        output.started = plan.started
        self._runner.prepare(plan)
        failed = self._encode(plan)
        scored = self._score(plan)
        sampled = self._runner.sample(self._runner.decode(plan), plan) if plan.decode else None
        # Rows move when somebody leaves, so nobody does before all of the plan has been computed.
        if sampled is not None:
            self._update(plan, sampled, failed, output)
        if plan.score is not None:
            self._update_job(plan.score.job, scored, output)
        self._end_failed_jobs(failed, output)
        self._changed = False
        output.stats = self._stats(plan)
        return output

    def _encode(self, plan: StepPlan) -> dict[int, str]:
        """Encode the plan's prompts; returns the error of each that could not be, by id(prompt)."""
        if not plan.encode:
            return {}
        try:
            self._runner.encode(plan.encode)
        except Exception:
            logger.exception("encoding %d prompts failed; trying them one by one", len(plan.encode))
            failed = self._encode_one_by_one(plan.encode)
        else:
            failed = {}
        for prompt in plan.encode:
            prompt.encoded = id(prompt) not in failed
            prompt.suspect = not prompt.encoded
        return failed

    def _encode_one_by_one(self, prompts: SequenceOf[Prompt]) -> dict[int, str]:
        failed: dict[int, str] = {}
        for prompt in prompts:
            try:
                self._runner.encode((prompt,))
            except Exception as error:
                logger.exception("a prompt of %d tokens cannot be encoded", len(prompt.token_ids))
                failed[id(prompt)] = f"the prompt could not be encoded: {type(error).__name__}"
        return failed

    def _score(self, plan: StepPlan) -> list[float] | str:
        """Score the plan's chunk; returns its sums, or why there are none."""
        if plan.score is None:
            return []
        try:
            return self._runner.score(plan.score)
        except Exception as error:
            logger.exception("scoring %d candidates failed", len(plan.score.candidates))
            return f"scoring failed: {type(error).__name__}: {error}"

    def _update_job(self, job: ScoreJob, scored: list[float] | str, output: StepOutput) -> None:
        if isinstance(scored, str):
            self._end_job(output, job, error=scored)
            return
        job.logprobs += scored
        if job.done:
            self._end_job(output, job)

    def _update(self, plan: StepPlan, sampled: Sampled, failed: dict[int, str], output: StepOutput) -> None:
        """Give each sequence its token, and end those that are done."""
        for row, sequence in enumerate(plan.decode):
            error = failed.get(id(sequence.prompt))
            if error is None and not sampled.finite[row]:
                error = "the model's output for this sequence is not finite"
            if error is not None:
                self.scheduler.remove(sequence, clear=True)
                self._end(output, sequence, FinishReason.ERROR, error=error)
                continue
            known = sequence.replaying
            sequence.position += 1
            if known:
                continue
            token_id = sampled.token_ids[row]
            sequence.token_ids.append(token_id)
            reason = self._finish_reason(sequence, token_id)
            logprob = sampled.logprobs.get(row)
            logprobs = () if logprob is None else (logprob,)
            if reason is None:
                _tell(output, sequence, (token_id,), logprobs)
            else:
                self.scheduler.remove(sequence)
                self._end(output, sequence, reason, token_ids=(token_id,), logprobs=logprobs)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id == self._eos_token_id and not sequence.params.ignore_eos:
            return FinishReason.STOP
        if len(sequence.token_ids) >= sequence.params.max_tokens:
            return FinishReason.LENGTH
        return None

    def _end(
        self,
        output: StepOutput,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> None:
        """Tell a sequence's last delta and forget it; the scheduler has let go of it already."""
        request_id = sequence.request_id
        _tell(output, sequence, token_ids, logprobs, reason, error)
        sequences = self._sequences[request_id]
        del sequences[sequence.index]
        if not sequences:
            del self._sequences[request_id]
            self.scheduler.forget_request(request_id)

    def _end_job(self, output: StepOutput, job: ScoreJob, error: str | None = None) -> None:
        self.scheduler.remove(job, clear=error is not None)
        del self._jobs[job.request_id]
        self.scheduler.forget_request(job.request_id)
        lengths = [len(candidate) for candidate in job.candidates]
        scores = tuple(zip(job.logprobs, lengths, strict=True)) if error is None else ()
        output.scores[job.request_id] = ScoreResult(scores, error)

    def _end_failed_jobs(self, failed: dict[int, str], output: StepOutput) -> None:
        for job in list(self._jobs.values()) if failed else ():
            error = failed.get(id(job.prompt))
            if error is not None:
                self._end_job(output, job, error)

    def _problem(self, token_ids: TokenIds, max_tokens: int, what: str = "prompt") -> str | None:
        """Why this can never run; None if it can. Ids are checked here: on a device a wrong one would end us all."""
        if not token_ids:
            return f"the {what} has no tokens"
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            return f"the {what} has a token id outside 0..{self._vocab_size - 1}"
        if not self.scheduler.fits(len(token_ids), max_tokens):
            return f"the {what} and its max_tokens need more cache than there is"
        return None

    def _check_unused(self, request_id: str) -> None:
        if request_id in self._sequences or request_id in self._jobs:
            raise ValueError(f"request id {request_id!r} is in use")

    def _stats(self, plan: StepPlan) -> EngineStats:
        scheduler = self.scheduler
        total = scheduler.room.total_bytes
        return EngineStats(
            encode_tokens=plan.encode_tokens,
            decode_sequences=len(plan.decode),
            encoder_cache_hits=plan.encoder_cache_hits,
            sequences_running=len(scheduler.running),
            requests_waiting=scheduler.requests_waiting,
            cache_usage=tuple(
                (pool.name, pool.used_bytes / total) for pool in (scheduler.self_pool, scheduler.cross_pool)
            ),
        )


def _tell(
    output: StepOutput,
    sequence: Sequence,
    token_ids: tuple[int, ...],
    logprobs: tuple[TokenLogprob, ...],
    reason: FinishReason | None = None,
    error: str | None = None,
) -> None:
    delta = TokenDelta(sequence.index, token_ids, logprobs, reason, error)
    output.deltas.setdefault(sequence.request_id, []).append(delta)
