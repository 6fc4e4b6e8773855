"""Our engine grown to decoder-only models: carries out its plans with a CausalModel.

What the engine calls encoding is here the prefill of all prompt tokens but the last; its decoder's start token is
that last prompt token. So n sequences, candidates and repeated prompts share one prefill, as with an encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from serve.engine.cache_tensors import CacheTensors, RowShape
from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.engine.runner import Runner
from serve.engine.sampler import Sampled, finite_logprob, sample
from serve.engine.scheduler import ScoreChunk, StepPlan
from serve.engine.scoring import NotFinite
from serve.engine.sequence import Prompt, Sequence, TokenIds
from serve.engine.slabs import SlabLimit, Slabs
from serve.output import FinishReason, TokenLogprob
from serve.runtimes.causal_attention import DecodeAttention, ForcedAttention, PrefillAttention
from serve.runtimes.causal_model import CausalModel

_LOGIT_ROWS = 64  # rows of the head at a time when scoring: 64 x 151,936 float32 are 39 MB


def _row_shape(model: CausalModel) -> RowShape:
    return RowShape(model.dims.layers, model.dims.kv_heads, model.dims.head_dim, model.dtype)


class CausalRunner:
    """A decoder-only model and its cache tensors on one device; see serve.engine.runner.Runner.

    A score request whose id is in `wanted` (with a number of alternatives) leaves the log-probability of each token
    of its first candidate in `details`.
    """

    def __init__(self, model: CausalModel, *, cache_bytes: int) -> None:
        self._model = model
        limit = SlabLimit(cache_bytes)
        pools = (Slabs(_row_shape(model), device=model.device, limit=limit) for _ in ("self", "cross"))
        self.cache = CacheTensors(*pools)
        self.wanted: dict[str, int] = {}
        self.details: dict[str, tuple[TokenLogprob, ...]] = {}

    def forget(self, request_id: str) -> None:
        """Nobody asks for the details of this request any more."""
        self.wanted.pop(request_id, None)
        self.details.pop(request_id, None)

    def prepare(self, plan: StepPlan) -> None:
        self.cache.apply(plan.operations)
        self.cache.settle(_rows(plan.decode), _rows(plan.prompts))

    def encode(self, prompts: SequenceOf[Prompt]) -> None:
        texts = [prompt.token_ids[:-1] for prompt in prompts]
        rows = [self._row(prompt) for prompt, text in zip(prompts, texts, strict=True) if text]
        if not rows:
            return  # prompts of one token have nothing before their last
        token_ids = [token_id for text in texts for token_id in text]
        positions = [position for text in texts for position in range(len(text))]
        self._model.states(self._ids(token_ids), self._ids(positions), PrefillAttention(rows))

    def score(self, chunk: ScoreChunk) -> list[float]:
        prompt = chunk.job.prompt
        if prompt is None:
            raise ValueError("a job that is scored holds its prompt")
        candidates, last = chunk.candidates, prompt.token_ids[-1]
        begin = len(prompt.token_ids) - 1
        inputs = [token_id for candidate in candidates for token_id in (last, *candidate[:-1])]
        positions = [begin + place for candidate in candidates for place in range(len(candidate))]
        lengths = [len(candidate) for candidate in candidates]
        attention = ForcedAttention(self._row(prompt), lengths)
        states = self._model.states(self._ids(inputs), self._ids(positions), attention)
        targets = [token_id for candidate in candidates for token_id in candidate]
        count = self.wanted.get(chunk.job.request_id)
        entries = self._logprobs(states, targets, 0 if count is None else count)
        if any(math.isnan(entry.logprob) for entry in entries):
            raise NotFinite("the model's output for this prompt is not finite")
        if count is not None and chunk.first == 0:
            self.details[chunk.job.request_id] = tuple(entries[: lengths[0]])
        sums: list[float] = []
        first = 0
        for length in lengths:
            sums.append(math.fsum(entry.logprob for entry in entries[first : first + length]))
            first += length
        return sums

    def decode(self, plan: StepPlan) -> Tensor:
        inputs = [s.token_ids[s.position - 1] if s.position > 0 else s.prompt_ids[-1] for s in plan.decode]
        positions = [len(s.prompt_ids) - 1 + s.position for s in plan.decode]
        attention = DecodeAttention(plan.decode, plan.prompts, self.cache, self._model.device)
        return self._model.logits(self._model.states(self._ids(inputs), self._ids(positions), attention))

    def sample(self, logits: Tensor, plan: StepPlan) -> Sampled:
        eos, *more = self._model.dims.eos_token_ids or (-1,)
        early = [
            row
            for row, s in enumerate(plan.decode)
            if len(s.token_ids) < s.params.min_tokens and not s.params.ignore_eos
        ]
        if early and more:  # the sampler knows one EOS
            logits[torch.tensor(early, device=logits.device)[:, None], self._ids(more)] = -math.inf
        return sample(logits, plan.decode, eos_token_id=eos)

    def _logprobs(self, states: Tensor, targets: list[int], count: int) -> list[TokenLogprob]:
        """Each target's log-probability and the `count` best; ids beyond the vocabulary's limit are impossible."""
        entries: list[TokenLogprob] = []
        for first in range(0, len(targets), _LOGIT_ROWS):
            ids = targets[first : first + _LOGIT_ROWS]
            normalized = self._model.logits(states[first : first + _LOGIT_ROWS]).log_softmax(-1)
            vocabulary = normalized.shape[1]
            chosen = self._ids([min(token_id, vocabulary - 1) for token_id in ids])
            values: list[float] = normalized.gather(1, chosen[:, None]).squeeze(1).tolist()
            best = normalized.topk(min(count, vocabulary), dim=-1)
            tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for token_id, value, (top_ids, top_values) in zip(ids, values, tops, strict=True):
                own = value if token_id < vocabulary or math.isnan(value) else -math.inf
                top = tuple((i, finite_logprob(v)) for i, v in zip(top_ids, top_values, strict=True))
                entries.append(TokenLogprob(token_id, own if math.isnan(own) else finite_logprob(own), top))
        return entries

    def _row(self, prompt: Prompt) -> Tensor:
        """View of a prompt's keys and values: [layers, 2, heads, prompt tokens - 1, head_dim]."""
        if prompt.slot is None:
            raise ValueError("only a prompt with a row can be used")
        row = self.cache.cross_rows.row(prompt.slot.capacity, prompt.slot.row)
        return row[..., : len(prompt.token_ids) - 1, :]

    def _ids(self, token_ids: list[int]) -> Tensor:
        return torch.tensor(token_ids, device=self._model.device)


class CausalEngine(Engine):
    """The engine with what T5 does not have: several EOS tokens, and a context that can be full."""

    def __init__(self, runner: Runner[Any], settings: EngineSettings, model: CausalModel) -> None:
        dims = model.dims
        bytes_per_token = _row_shape(model).bytes_per_token
        eos = dims.eos_token_ids or (-1,)
        super().__init__(
            runner,
            settings,
            vocab_size=dims.vocab_size,
            eos_token_id=eos[0],
            self_bytes_per_token=bytes_per_token,
            cross_bytes_per_token=bytes_per_token,
        )
        self._eos_token_ids = frozenset(eos)
        self._context_length = dims.context_length

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in self._eos_token_ids and not sequence.params.ignore_eos:
            return FinishReason.STOP
        if len(sequence.prompt_ids) + len(sequence.token_ids) >= self._context_length:
            return FinishReason.LENGTH
        return super()._finish_reason(sequence, token_id)

    def _problem(self, token_ids: TokenIds, max_tokens: int, what: str = "prompt") -> str | None:
        if len(token_ids) >= self._context_length:
            return f"the {what} has {len(token_ids)} tokens; the model's context has {self._context_length}"
        room = self._context_length - len(token_ids)
        return super()._problem(token_ids, min(max_tokens, room), what)


def _rows(holders: SequenceOf[Prompt] | SequenceOf[Sequence]) -> dict[int, int]:
    """Rows in use of each capacity."""
    rows: dict[int, int] = {}
    for holder in holders:
        if holder.slot is not None:
            rows[holder.slot.capacity] = rows.get(holder.slot.capacity, 0) + 1
    return rows
