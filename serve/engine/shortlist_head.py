"""The head of a greedy step on a CPU: an int8 product names the few tokens that can be the best, float32 decides.

Reading a head of 32,128 rows is half of a small model's decode step. For a row that only asks for its best token most
of it need not be read: with int8 weights and 7-bit states every logit is known up to a bound, and only tokens whose
upper bound reaches the best lower bound are computed from the real weights. The bound is Cauchy-Schwarz's,

    |w x - w' x'| <= |w - w'| |x| + |w'| |x - x'|

with all four norms known exactly, so the token is the argmax of the full product, not likely but always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.int8_linear import int8_linear, quantized

BLOCK = 128  # tokens that share a bound
MIN_VOCABULARY = 4096  # below this the full product is as fast
MAX_CANDIDATES = 512  # a row; with more, the full product is faster
_GATHERED = 1024  # candidates whose weights are looked at together: 2 MB for a width of 512


@dataclass(frozen=True, slots=True)
class Shortlisted:
    """Each state's best token [rows] int64 and its logit [rows] float32, where not `crowded` [rows].

    Crowded rows have too many tokens that could be it, or are not finite: they must be computed in full.
    """

    token_ids: Tensor
    logits: Tensor
    crowded: Tensor


class ShortlistHead:
    """The token of each state's largest logit, exactly, and that logit."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` [vocabulary, width], the head's own numbers, in float32 or float16."""
        self._vocabulary = weight.shape[0]
        self._weight = weight
        self._product = int8_linear(_padded(weight), few_rows=True)
        self._lost, self._norms = block_bounds(weight)

    def __call__(self, states: Tensor) -> Shortlisted:
        """Of states [rows, width]."""
        logits, loss = self._product.with_loss(states)
        logits[:, self._vocabulary :] = -math.inf
        blocks = logits.view(states.shape[0], -1, BLOCK)
        best = blocks.amax(-1)
        bound = states.norm(dim=1, keepdim=True) * self._lost
        bound.addcmul_(loss, self._norms)
        reach = (best - bound).amax(1, keepdim=True) - bound  # [rows, blocks]: what a candidate's int8 logit reaches
        row, block = (best >= reach).nonzero(as_tuple=True)
        inside = blocks[row, block] >= reach[row, block, None]
        place, column = inside.nonzero(as_tuple=True)
        rows, tokens = row[place], block[place] * BLOCK + column
        crowded = torch.bincount(rows, minlength=states.shape[0])
        crowded = (crowded > MAX_CANDIDATES) | (crowded == 0)  # none: not finite
        if bool(crowded.any()):
            kept = ~crowded[rows]
            rows, tokens = rows[kept], tokens[kept]
        found = self._exact(states, rows, tokens)
        best = found.new_full((states.shape[0],), -math.inf).scatter_reduce_(0, rows, found, "amax")
        first = torch.full_like(best, self._vocabulary, dtype=torch.int64)
        is_best = found == best[rows]
        first.scatter_reduce_(0, rows[is_best], tokens[is_best], "amin")  # of equal ones
        return Shortlisted(first, best, crowded)

    def _exact(self, states: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """The logit of each (row, token): [candidates]."""
        parts = zip(torch.split(rows, _GATHERED), torch.split(tokens, _GATHERED), strict=True)
        # index_select is parallel where weight[tokens] is not.
        picked = ((self._weight.index_select(0, some).float(), states.index_select(0, at)) for at, some in parts)
        return torch.cat([rows_.mul_(states_).sum(-1) for rows_, states_ in picked])


def block_bounds(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each block of tokens, the largest |w - w'| (and what float32 sums may be off), and |w'|: [blocks] each."""
    padded = _padded(weight)
    numbers, scales = quantized(padded)
    stored = numbers * scales[:, None]
    norms = stored.norm(dim=1)
    # float32 sums of `width` products are off by less than width * 2^-24 of the product of both norms.
    lost = (padded - stored).norm(dim=1) + norms * weight.shape[1] * 2.0**-22
    return lost.view(-1, BLOCK).amax(1), norms.view(-1, BLOCK).amax(1) * (1 + 1e-5)


def _padded(weight: Tensor) -> Tensor:
    """float32, with zeros up to whole blocks."""
    wide = weight.float()
    return torch.cat((wide, wide.new_zeros(-wide.shape[0] % BLOCK, wide.shape[1])))
