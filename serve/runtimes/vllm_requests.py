"""Requests and results between our words and vLLM's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams as VllmSamplingParams
from vllm.sampling_params import RequestOutputKind

from serve.output import IMPOSSIBLE_LOGPROB, FinishReason, TokenDelta, TokenLogprob
from serve.runtimes.vllm_logits import PENALTY
from serve.sampling_params import SamplingParams

_FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.CANCELLED}


def to_prompt(token_ids: Sequence[int], forced: Sequence[int] = (), *, is_encoder_decoder: bool) -> dict[str, Any]:
    """`token_ids` and a given beginning of the answer, as vLLM takes them.

    A plain prompt of an encoder-decoder goes to the encoder: that is the T5 plugin's doing.
    """
    if not is_encoder_decoder:
        return {"type": "token", "prompt_token_ids": [*token_ids, *forced]}
    encoder = {"prompt_token_ids": list(token_ids)}
    return {"encoder_prompt": encoder, "decoder_prompt": {"prompt_token_ids": list(forced)}} if forced else encoder


def to_sampling_params(sampling: SamplingParams, sample: int, eos_token_ids: Sequence[int]) -> VllmSamplingParams:
    """For sample number `sample` of n. Stop strings are ours to find; vLLM sees no text."""
    penalty = sampling.repetition_penalty
    return VllmSamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=0 if sampling.ignore_eos else sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=None if sampling.seed is None else sample_seed(sampling.seed, sample),
        logprobs=sampling.logprobs,
        logit_bias=dict(sampling.logit_bias) or None,
        stop_token_ids=[] if sampling.ignore_eos else list(eos_token_ids),
        ignore_eos=sampling.ignore_eos,
        extra_args=None if penalty == 1.0 else {PENALTY: penalty},
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def to_scoring_params(count: int) -> VllmSamplingParams:
    """The prompt's log-probabilities with the `count` best, and the one token that there must be."""
    return VllmSamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=count, detokenize=False)


def to_delta(index: int, output: Any, count: int | None, vocab_limit: int | None) -> TokenDelta:
    """What a RequestOutput of one sequence brought."""
    made = output.outputs[0]
    ids = tuple(made.token_ids)
    logprobs: tuple[TokenLogprob, ...] = ()
    if count is not None and made.logprobs:
        pairs = zip(ids, made.logprobs, strict=True)
        logprobs = tuple(to_logprob(token_id, entries, count, vocab_limit) for token_id, entries in pairs)
    if made.finish_reason is None:
        return TokenDelta(index, ids, logprobs)
    reason = _FINISH_REASONS.get(made.finish_reason, FinishReason.ERROR)
    error = f"vLLM: {made.stop_reason or made.finish_reason}" if reason is FinishReason.ERROR else None
    return TokenDelta(index, ids, logprobs, reason, error)


def to_logprob(token_id: int, entries: Mapping[int, Any], count: int, vocab_limit: int | None) -> TokenLogprob:
    """vLLM has the token and the `count` best ones in one mapping, each with its rank."""
    best = sorted((entry.rank, found, entry.logprob) for found, entry in entries.items())
    top = tuple(
        (found, max(logprob, IMPOSSIBLE_LOGPROB))
        for rank, found, logprob in best
        if rank <= count and (vocab_limit is None or found < vocab_limit)
    )
    return TokenLogprob(token_id, max(entries[token_id].logprob, IMPOSSIBLE_LOGPROB), top)


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of n sequences: far from those of other seeds, unlike vLLM's own seed + sample.

    Never -1, which means "no seed" to vLLM.
    """
    if sample == 0 and seed != -1:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
