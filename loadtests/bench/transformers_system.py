"""transformers' `generate` as a system under test, in batches sorted by input length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loadtests.bench.prompts import Request
from loadtests.bench.queueing import serve_in_batches
from loadtests.bench.shapes import PAD_ID
from loadtests.bench.system import OnToken, Place, Tokens, Tuning, by_length

NAME = "transformers"
_BATCHES = (32, 16, 64, 8)  # requests, tried in this order where there are many at a time
_MANY = 32


class Lengths:
    """A stopping criterion that ends each row at its own length, and tells of every token."""

    def __init__(self, lengths: Sequence[int], on_token: OnToken | None) -> None:
        self._lengths = torch.tensor(lengths)
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """`input_ids` [rows, 1 + tokens so far], the start token first; returns [rows], True where done."""
        del scores, kwargs
        made = input_ids.shape[1] - 1
        if self._on_token is not None:
            for row in (self._lengths >= made).nonzero().flatten().tolist():
                self._on_token(row)
        return (self._lengths <= made).to(input_ids.device)


class TransformersSystem:
    """See loadtests.bench.system.System."""

    name = NAME

    def __init__(self, place: Place, setting: str) -> None:
        from transformers import T5ForConditionalGeneration

        if place.folder is None:
            raise ValueError("a peer needs a checkpoint folder")
        self.setting = setting
        torch.set_num_threads(place.threads)
        self._threads = place.threads
        self._tuning = Tuning(threads=place.threads)
        model: Any = T5ForConditionalGeneration.from_pretrained(place.folder, dtype=getattr(torch, setting))
        self._model = model.eval().to(place.device)
        self.vocab_size: int = model.config.vocab_size

    def candidates(self, count: int) -> list[Tuning]:
        sizes = [size for size in _BATCHES if size < count] if count > _MANY else []
        whole = [0] if count <= max(_BATCHES) else []
        return [Tuning(batch=size, threads=self._threads) for size in (*whole, *sizes)]

    def use(self, tuning: Tuning) -> None:
        self._tuning = tuning

    def generate(self, requests: Sequence[Request], *, at_once: int = 0, on_token: OnToken | None = None) -> Tokens:
        order = by_length(requests)
        limits = [limit for limit in (self._tuning.batch, at_once, len(requests)) if limit > 0]
        size = min(limits, default=1)
        tokens: Tokens = [[] for _ in requests]
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = [requests[place] for place in places]
            for place, made in zip(places, self._batch(batch, places, on_token), strict=True):
                tokens[place] = made
        return tokens

    def sample(self, request: Request, count: int, seed: int) -> Tokens:
        torch.manual_seed(seed)
        return self._generate(
            [request.ids], request.length, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=count
        )

    def score(self, ids: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        """One forward pass over the prompt, encoded once, and all candidates as labels; padding is masked out."""
        device = self._model.device
        labels, mask = padded([tuple(candidate) for candidate in candidates], device)
        with torch.inference_mode():
            states = self._model.get_encoder()(input_ids=torch.tensor([list(ids)], device=device)).last_hidden_state
            states = states.expand(len(candidates), -1, -1)
            logits = self._model(encoder_outputs=(states,), labels=labels).logits.float()
            logprobs = logits.log_softmax(-1).gather(2, labels[..., None]).squeeze(2)
        sums: list[float] = (logprobs * mask).sum(1).tolist()
        return sums

    def serve(self, requests: Sequence[Request], due: Sequence[float]) -> list[list[float]]:
        return serve_in_batches(
            lambda batch, tell: self.generate(batch, on_token=tell), requests, due, largest=self._tuning.batch
        )

    def _batch(self, batch: Sequence[Request], places: Sequence[int], on_token: OnToken | None) -> Tokens:
        lengths = [request.length for request in batch]
        told = None if on_token is None else lambda row: on_token(places[row])
        extra: dict[str, Any] = {}
        if told is not None or len(set(lengths)) > 1:
            extra["stopping_criteria"] = [Lengths(lengths, told)]
        made = self._generate([request.ids for request in batch], max(lengths), do_sample=False, **extra)
        return [ids[:length] for ids, length in zip(made, lengths, strict=True)]

    def _generate(self, prompts: Sequence[Sequence[int]], length: int, **extra: Any) -> Tokens:
        """Tokens after the start token. Without an end token only `length` and the criteria end a row."""
        ids, mask = padded(prompts, self._model.device)
        config = self._model.generation_config
        config.eos_token_id = None
        with torch.inference_mode():
            made = self._model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=length, num_beams=1, **extra)
        tokens: Tokens = made[:, 1:].tolist()
        return tokens


def padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [rows, longest] of integers; what is beyond a row's end is padding and 0."""
    longest = max(map(len, rows))
    ids = [[*row, *[PAD_ID] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
