"""Carries out what the scheduler decided: row copies, the encode batch, the chunk of scoring, the decode step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from serve.engine.cache_tensors import CacheTensors
from serve.engine.decode_batch import DecodeBatch
from serve.engine.model import T5Model
from serve.engine.native.decoder import NativeDecoder
from serve.engine.row_tensors import RowTensors
from serve.engine.sampler import BestTokens, Sampled, sample, wants_best_only
from serve.engine.scheduler import ScoreChunk, StepPlan
from serve.engine.scoring import score_candidates
from serve.engine.sequence import Prompt
from serve.engine.slabs import SlabLimit, Slabs
from serve.engine.spare_memory import SpareMemory
from serve.engine.thread_choice import ThreadChoice

Decoded = TypeVar("Decoded")


class Runner(Protocol[Decoded]):
    """What the engine asks for in a step, in this order. Wrap one to time or to disturb it.

    Decoded is what goes from `decode` to `sample`: logits [sequences, vocabulary], or what stands for them.
    """

    def prepare(self, plan: StepPlan) -> None:
        """Carry out the plan's row copies and fit the cache to it."""
        ...

    def encode(self, prompts: SequenceOf[Prompt]) -> None:
        """Encode prompts in one batch and fill their rows. Any exception concerns these prompts only."""
        ...

    def score(self, chunk: ScoreChunk) -> list[float]:
        """Summed log-probability of each candidate of the chunk. Any exception concerns its job only."""
        ...

    def decode(self, plan: StepPlan) -> Decoded:
        """One decode step of all `plan.decode`."""
        ...

    def sample(self, logits: Decoded, plan: StepPlan) -> Sampled:
        """The next token of each of `plan.decode`. May change `logits`."""
        ...


class ModelRunner:
    """A model and its cache tensors on one device."""

    def __init__(self, model: T5Model, *, cache_bytes: int, thread_worth_seconds: float = 0.0) -> None:
        """`thread_worth_seconds`: see EngineSettings."""
        self._model = model
        on_cpu = model.device.type == "cpu"
        self._threads = ThreadChoice.of(model, worth_seconds=thread_worth_seconds) if on_cpu else None
        self.cache: CacheTensors[RowTensors] | CacheTensors[Slabs]
        self._states: Callable[[StepPlan], Tensor]  # one decoder position of all that decode: [sequences, d_model]
        if model.native_decoder is not None:
            spare = SpareMemory(cache_bytes)
            rows = CacheTensors(*(RowTensors(model.cache_row, spare=spare) for _ in ("self", "cross")))
            self.cache, self._states = rows, partial(_native_states, model.native_decoder, rows)
        else:
            limit = SlabLimit(cache_bytes)
            pools = (Slabs(model.cache_row, device=model.device, limit=limit) for _ in ("self", "cross"))
            slabs = CacheTensors(*pools)
            self.cache, self._states = slabs, partial(_states, model, slabs)

    def prepare(self, plan: StepPlan) -> None:
        self_rows, cross_rows = rows_in_use(plan.decode), rows_in_use(plan.prompts)
        self.cache.reserve(self_rows, cross_rows)  # first: many that grow at once are one allocation
        self.cache.apply(plan.operations)
        self.cache.settle(self_rows, cross_rows)

    def encode(self, prompts: SequenceOf[Prompt]) -> None:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        token_ids = self._ids([token_id for prompt in prompts for token_id in prompt.token_ids])
        if self._model.native_encoder is not None:
            self._model.native_encoder(token_ids, lengths, [self._cross_row(prompt) for prompt in prompts])
            return
        states = self._model.encode(token_ids, lengths)
        narrow = torch.finfo(torch.float16) if self._model.cache_row.dtype is torch.float16 else None
        for layer, keys_values in enumerate(self._model.cross_keys_values(states)):
            if narrow is not None:  # what is beyond float16 becomes its largest number, as in the decode step
                keys_values.clamp_(narrow.min, narrow.max)
            for prompt, part in zip(prompts, torch.split(keys_values, lengths), strict=True):
                self._cross_row(prompt)[layer] = part.permute(1, 2, 0, 3)

    def score(self, chunk: ScoreChunk) -> list[float]:
        prompt = chunk.job.prompt
        if prompt is None:
            raise ValueError("a job that is scored holds its prompt")
        return score_candidates(self._model, chunk.candidates, self._cross_row(prompt))

    def decode(self, plan: StepPlan) -> Tensor | BestTokens:
        """Logits [sequences, vocabulary] float32, which for a sequence that wants its best token only
        (sampler.wants_best_only) may hold nothing else; or no logits, where all do.
        """
        best_only = [wants_best_only(sequence) for sequence in plan.decode]
        with nullcontext() if self._threads is None else self._threads(len(plan.decode)):
            states = self._states(plan)
            best = self._model.best_tokens(states) if all(best_only) else None
            return self._model.logits(states, best_only) if best is None else best

    def sample(self, logits: Tensor | BestTokens, plan: StepPlan) -> Sampled:
        return sample(logits, plan.decode, eos_token_id=self._model.config.eos_token_id)

    def _cross_row(self, prompt: Prompt) -> Tensor:
        """View of a prompt's keys and values: [layers, 2, heads, prompt length, d_kv]."""
        if prompt.slot is None:
            raise ValueError("only a prompt with a row can be used")
        row = self.cache.cross_rows.row(prompt.slot.capacity, prompt.slot.row)
        return row[..., : len(prompt.token_ids), :]

    def _ids(self, token_ids: list[int]) -> Tensor:
        return torch.tensor(token_ids, device=self._model.device)


def _native_states(decoder: NativeDecoder, cache: CacheTensors[RowTensors], plan: StepPlan) -> Tensor:
    return decoder.step(plan.decode, cache)


def _states(model: T5Model, cache: CacheTensors[Slabs], plan: StepPlan) -> Tensor:
    batch = DecodeBatch(
        plan.decode,
        plan.prompts,
        cache,
        model.decoder_bias,
        start_token_id=model.config.decoder_start_token_id,
        device=model.device,
    )
    return model.decode(batch.input_ids, batch)


def rows_in_use(holders: SequenceOf[Prompt] | SequenceOf[object]) -> dict[int, int]:
    """Rows in use of each capacity."""
    rows: dict[int, int] = {}
    for holder in holders:
        slot = getattr(holder, "slot", None)
        if slot is not None:
            rows[slot.capacity] = rows.get(slot.capacity, 0) + 1
    return rows
