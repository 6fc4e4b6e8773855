"""Summed log-probabilities of given answers to one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from serve.engine.attention import RaggedAttend
from serve.engine.model import T5Model
from serve.engine.sampler import finite_logprob
from serve.engine.transfer import to_device

_LOGIT_ROWS = 64  # rows of the head at a time: 64 x 32,128 float32 are 8 MB


class NotFinite(Exception):
    """A computation for one request gave NaN or infinity."""


def score_candidates(
    model: T5Model, candidates: Sequence[Sequence[int]], cross: Tensor, attend: RaggedAttend | None = None
) -> list[float]:
    """The log-probability of each candidate after the prompt of `cross` [layers, 2, H, prompt length, D].

    `attend` is causal attention within each candidate, None for the one that runs everywhere.

    Raises:
        NotFinite: the model's output is NaN.
    """
    start = model.config.decoder_start_token_id
    lengths = [len(candidate) for candidate in candidates]
    inputs = to_device([token for c in candidates for token in (start, *c[:-1])], model.device)
    states = model.decode_forced(inputs, lengths, cross.unbind(0), attend)
    targets = to_device([token for candidate in candidates for token in candidate], model.device)
    parts = zip(torch.split(states, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True)
    logprobs = torch.cat([_logprobs(model, some, some_targets) for some, some_targets in parts]).tolist()
    if any(math.isnan(value) for value in logprobs):
        raise NotFinite("the model's output for this prompt is not finite")
    sums: list[float] = []
    first = 0
    for length in lengths:
        sums.append(math.fsum(finite_logprob(value) for value in logprobs[first : first + length]))
        first += length
    return sums


def _logprobs(model: T5Model, states: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: [tokens]. Ids beyond the vocabulary's limit are impossible: -inf."""
    normalized = model.logits(states).log_softmax(-1)
    vocabulary = normalized.shape[1]
    values = normalized.gather(1, targets.clamp(max=vocabulary - 1)[:, None]).squeeze(1)
    return torch.where(values.isnan() | (targets < vocabulary), values, -math.inf)
