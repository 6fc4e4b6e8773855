"""Logits -> one token a sequence.

Order of operations on a row (as in transformers): repetition penalty, logit bias, no EOS before min_tokens; then the
log-probabilities are read off; then temperature, top-k, top-p and the draw. So reported log-probabilities belong to
the distribution after penalties, bias and the vocabulary's limit, and before temperature, top-k and top-p.

Randomness is counter-based: the draw of a sequence's token number p is a function of (seed, sample number, p) and of
nothing else, so neither the batch nor a restart or preemption changes it. The draw goes through the inverse of the
cumulative distribution in order of token ids, which equal probabilities cannot reorder. (What remains is rounding: the
same sequence in two batches has logits that differ by 1e-6, so about one draw in a million falls on the other side.)

Only rows that ask for something pay for it: an all-greedy batch is one argmax. On a CUDA device the host looks at
nothing but the result: where it would have to ask how far a nucleus reaches, all candidates are sorted there instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.sequence import Sequence
from serve.engine.transfer import to_device
from serve.output import IMPOSSIBLE_LOGPROB, TokenLogprob

_BLOCK = 128
_CANDIDATES = (256, 4096)  # what top-k and top-p leave is looked for among so many best tokens, then all
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Sampled:
    """Per row of the batch: its token, whether its logits were finite, and log-probabilities where asked for."""

    token_ids: list[int]
    finite: list[bool]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # row -> the chosen token's


@dataclass(frozen=True, slots=True)
class BestTokens:
    """What stands for the logits of rows that want nothing of them but the largest's token: see `wants_best_only`."""

    token_ids: Tensor  # [rows] int64
    finite: Tensor  # [rows] whether the logits are


def uniform(seed: int, sample: int, position: int) -> float:
    """The number in [0, 1) that draws token `position` of sample `sample`: SplitMix64's mixing of all three.

    48 bits, so that times a total it stays below that total in float64.
    """
    state = seed & _MASK64
    for word in (sample, position):
        state = _mix((state + _GOLDEN * (word + 1)) & _MASK64)
    return (state >> 16) / (1 << 48)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def wants_best_only(sequence: Sequence) -> bool:
    """Whether a sequence's next token is its largest logit's as it is, and nothing else is asked of the others.

    What it replays does not matter.
    """
    params = sequence.params
    if sequence.replaying:
        return True
    plain = params.greedy and params.logprobs is None and params.repetition_penalty == 1.0 and not params.logit_bias
    return plain and (params.ignore_eos or len(sequence.token_ids) >= params.min_tokens)


def sample(logits: Tensor | BestTokens, sequences: SequenceOf[Sequence], *, eos_token_id: int) -> Sampled:
    """Choose the next token of each sequence.

    `logits` [sequences, vocabulary] float32 is changed in place; BestTokens are for sequences that all want no more.
    Rows that replay known tokens are not worth more than an argmax. A row that is not finite gets an arbitrary token
    and `finite` false.
    """
    if isinstance(logits, BestTokens):
        return Sampled(logits.token_ids.tolist(), logits.finite.tolist())
    best = _block_maxima(logits)
    finite = best.amax(-1).isfinite()  # before anybody is forbidden a token
    changed = [row for row, s in enumerate(sequences) if not wants_best_only(s)]
    if changed:
        _penalize(logits, sequences)
        _bias(logits, sequences, eos_token_id)
        best = _block_maxima(logits)
    chosen = _argmax(logits, best)
    drawn = [row for row in changed if not sequences[row].params.greedy]
    if drawn:
        rows = to_device(drawn, logits.device)
        chosen[rows] = _draw(logits[rows], [sequences[row] for row in drawn])
    asked = [row for row in changed if sequences[row].params.logprobs is not None]
    if asked:
        return _with_logprobs(logits, chosen, finite, asked, sequences)
    # One transfer from the device for ids and flags together.
    token_ids, flags = torch.stack((chosen, finite.long())).tolist()
    return Sampled(token_ids, [bool(flag) for flag in flags])


def best_and_finite(logits: Tensor) -> Tensor:
    """[2, rows] int64: each row's best token, and whether its logits are finite. May be captured in a CUDA graph."""
    best = _block_maxima(logits)
    return torch.stack((_argmax(logits, best), best.amax(-1).isfinite().long()))


def _penalize(logits: Tensor, sequences: SequenceOf[Sequence]) -> None:
    """Repetition penalty over the tokens a sequence has generated; the prompt and the start token do not count."""
    rows: list[int] = []
    columns: list[int] = []
    penalties: list[float] = []
    for row, sequence in enumerate(sequences):
        if sequence.params.repetition_penalty != 1.0 and sequence.token_ids:
            rows += [row] * len(sequence.token_ids)
            columns += sequence.token_ids
            penalties += [sequence.params.repetition_penalty] * len(sequence.token_ids)
    if not rows:
        return
    at = (to_device(rows, logits.device), to_device(columns, logits.device))
    penalty = to_device(penalties, logits.device, dtype=logits.dtype)
    values = logits[at]
    # A token that was generated twice is written twice with the same value: the penalty does not add up.
    logits[at] = torch.where(values > 0, values / penalty, values * penalty)


def _bias(logits: Tensor, sequences: SequenceOf[Sequence], eos_token_id: int) -> None:
    """Logit bias, and no EOS before `min_tokens` (unless EOS is an ordinary token)."""
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    vocabulary = logits.shape[1]
    for row, sequence in enumerate(sequences):
        params = sequence.params
        for token_id, value in params.logit_bias.items():
            if token_id < vocabulary:
                rows.append(row)
                columns.append(token_id)
                values.append(value)
        if len(sequence.token_ids) < params.min_tokens and not params.ignore_eos:
            rows.append(row)
            columns.append(eos_token_id)
            values.append(-math.inf)
    if rows:
        at = (to_device(rows, logits.device), to_device(columns, logits.device))
        logits.index_put_(at, to_device(values, logits.device, dtype=logits.dtype), accumulate=True)


def _block_maxima(logits: Tensor) -> Tensor:
    """The largest logit of each block of _BLOCK tokens, the last of which may be shorter: [rows, blocks]."""
    vocabulary = logits.shape[1]
    whole = vocabulary - vocabulary % _BLOCK
    best = logits[:, :whole].view(logits.shape[0], whole // _BLOCK, _BLOCK).amax(-1)
    if whole < vocabulary:
        best = torch.cat((best, logits[:, whole:].amax(-1, keepdim=True)), dim=1)
    return best


def _argmax(logits: Tensor, best: Tensor) -> Tensor:
    """Id of each row's largest logit, [rows]; the smaller id where several are equal. `best` are its blocks' maxima.

    In two stages, because finding a maximum is vectorised and finding its place is not (15 times slower).
    """
    columns = best.argmax(-1, keepdim=True) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    columns.clamp_(max=logits.shape[1] - 1)
    place = logits.gather(1, columns).argmax(-1, keepdim=True)
    return columns.gather(1, place).squeeze(1)


def _draw(logits: Tensor, sequences: SequenceOf[Sequence], *, may_look: bool | None = None) -> Tensor:
    """One token of each row by temperature, top-k and top-p: [rows]. `logits` [rows, vocabulary] is a copy.

    `may_look` (default: not on CUDA): whether the host may read back how far the nuclei reach.
    """
    device, vocabulary = logits.device, logits.shape[1]
    if may_look is None:
        may_look = device.type != "cuda"
    limits = [s.params.top_k or vocabulary for s in sequences]
    shares = [s.params.top_p for s in sequences]
    logits /= to_device([s.params.temperature for s in sequences], device, dtype=logits.dtype)[:, None]
    numbers = [uniform(s.seed, s.sample, s.position) for s in sequences]
    draws = to_device(numbers, device, dtype=torch.float64)[:, None]
    top_k = to_device(limits, device)[:, None]
    top_p = to_device(shares, device, dtype=torch.float64)[:, None]
    chosen = torch.empty(len(sequences), device=device, dtype=torch.long)
    limited = [row for row in range(len(sequences)) if limits[row] < vocabulary or shares[row] < 1.0]
    left = sorted(set(range(len(sequences))).difference(limited))
    for candidates in _CANDIDATES:
        rows = [row for row in limited if sequences[row].params.top_k <= candidates]
        if not may_look:  # top-k alone says for certain that its tokens are among the candidates
            rows = [row for row in rows if sequences[row].params.top_k > 0]
        if rows:
            # Only as many as needed: more candidates than a row's own top-k do not change its draw.
            count = min(max(sequences[row].params.top_k or candidates for row in rows), vocabulary)
            certain = all(limits[row] <= count for row in rows)
            at = to_device(rows, device)
            chosen[at], enough = _draw_among_best(logits[at], draws[at], top_k[at], top_p[at], count, certain=certain)
            found = [True] * len(rows) if certain else enough.tolist()
            done = {row for row, is_done in zip(rows, found, strict=True) if is_done}
            limited = [row for row in limited if row not in done]
    left += limited
    if left:
        at = to_device(left, device)
        chosen[at] = _draw_among_all(logits[at], draws[at], top_k[at], top_p[at], limited=bool(limited))
    return chosen


def _draw_among_best(
    logits: Tensor, draws: Tensor, top_k: Tensor, top_p: Tensor, candidates: int, *, certain: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw where top-k or top-p leaves at most `candidates` tokens, without looking at all the others.

    draws, top_k, top_p are [rows, 1]; `certain` says that no row's top-k is above `candidates`. Returns the tokens
    [rows], and whether each row's nucleus was among the candidates at all [rows].
    """
    candidates = min(candidates, logits.shape[1])
    best, token_ids = logits.topk(candidates, dim=-1)
    best = best.double()
    limited = top_k <= candidates
    best.masked_fill_(torch.arange(candidates, device=logits.device) >= top_k, -math.inf)
    # top-p looks at the distribution that top-k has left.
    total = best.logsumexp(-1, keepdim=True)
    if not certain:
        total = torch.where(limited, total, logits.logsumexp(-1, keepdim=True).double())
    probabilities = (best - total).exp()
    cumulative = probabilities.cumsum(-1)
    kept = cumulative - probabilities < top_p  # the smallest set that reaches top_p; at least the best token
    enough = limited | (cumulative[:, -1:] >= top_p)
    token_ids, order = token_ids.sort(dim=-1)
    weights = (probabilities * kept).gather(1, order)
    return token_ids.gather(1, _invert(weights, draws)).squeeze(1), enough.squeeze(1)


def _draw_among_all(logits: Tensor, draws: Tensor, top_k: Tensor, top_p: Tensor, *, limited: bool = True) -> Tensor:
    """Draw from the whole vocabulary: no limit, or (`limited`) one that leaves very many tokens."""
    weights = logits.softmax(-1)
    if limited:  # sorting a vocabulary is slow
        best = weights.sort(dim=-1, descending=True).values.double()
        best *= torch.arange(best.shape[1], device=best.device) < top_k
        cumulative = best.cumsum(-1)
        kept = (cumulative - best < top_p * cumulative[:, -1:]) & (best > 0)
        last = best.gather(1, (kept.sum(-1, keepdim=True) - 1).clamp_(min=0))
        weights = torch.where(weights < last, 0.0, weights)
    return _invert(weights, draws).squeeze(1)


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """The column at which the running sum of `weights` [rows, columns] passes draw x total: [rows, 1].

    First the block, then the column in it: only the blocks' sums and one block a row are added up in order.
    """
    padded = F.pad(weights, (0, -weights.shape[1] % _BLOCK)).view(weights.shape[0], -1, _BLOCK)
    blocks = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    targets = draws * blocks[:, -1:]
    block = torch.searchsorted(blocks, targets, right=True).clamp_(max=blocks.shape[1] - 1)
    before = blocks.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    inside = padded.gather(1, block[:, :, None].expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(-1)
    # Added up in another order the block may come out a rounding smaller; the draw must stay inside it.
    targets = (targets - before).clamp(min=0.0).minimum(inside[:, -1:] * (1 - 1e-12))
    column: Tensor = torch.searchsorted(inside, targets, right=True).clamp_(max=_BLOCK - 1)
    # A row that is not finite finds nothing and would point beyond the end, which a CUDA device does not survive.
    return (block * _BLOCK + column).clamp_(max=weights.shape[1] - 1)


def _with_logprobs(
    logits: Tensor, chosen: Tensor, finite: Tensor, asked: list[int], sequences: SequenceOf[Sequence]
) -> Sampled:
    """The result with the log-probabilities of the rows `asked`; all of it crosses from the device at once."""
    at = to_device(asked, logits.device)
    normalized = logits[at].log_softmax(-1)
    own = normalized.gather(1, chosen[at][:, None])
    counts = [sequences[row].params.logprobs or 0 for row in asked]
    best = normalized.topk(min(max(counts), normalized.shape[1]), dim=-1)
    # float64 holds ids and float32 numbers alike, exactly.
    parts = (chosen, finite, own.flatten(), best.values.flatten(), best.indices.flatten())
    numbers: list[float] = torch.cat([part.double() for part in parts]).tolist()
    rows, wide = len(chosen), best.values.shape[1]
    token_ids = [int(number) for number in numbers[:rows]]
    flags = [bool(number) for number in numbers[rows : 2 * rows]]
    values = numbers[2 * rows : 2 * rows + len(asked)]
    top_values = numbers[2 * rows + len(asked) : 2 * rows + len(asked) * (1 + wide)]
    top_ids = numbers[2 * rows + len(asked) * (1 + wide) :]
    logprobs = {
        row: TokenLogprob(
            token_id=token_ids[row],
            logprob=finite_logprob(values[i]),
            top=tuple((int(top_ids[k]), finite_logprob(top_values[k])) for k in range(i * wide, i * wide + shown)),
        )
        for i, (row, shown) in enumerate(zip(asked, (min(count, wide) for count in counts), strict=True))
        if flags[row]
    }
    return Sampled(token_ids, flags, logprobs)


def finite_logprob(value: float) -> float:
    """A log-probability as the wire may carry it: an impossible token has IMPOSSIBLE_LOGPROB."""
    return value if value > IMPOSSIBLE_LOGPROB else IMPOSSIBLE_LOGPROB
