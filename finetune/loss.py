"""The loss: cross-entropy over target tokens, with T5X's z-loss; always in float32.

Micro steps and ranks never average by themselves: each gives the *sum* over its target tokens divided by the number
of target tokens of the whole step, so 1 x 8, 2 x 4 and 8 x 1 rows give the same gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  (the name everybody knows)
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over tokens. `total` is what is minimised; `cross_entropy` and `z_loss` are what is logged."""

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


def sum_loss(logits: Tensor, targets: Tensor, z_loss: float) -> LossParts:
    """Summed loss of `logits` [tokens, vocab] against `targets` [tokens].

    With Z = sum(exp(logits)): cross-entropy log Z - logit(target), and z_loss * (log Z)^2 keeps log Z near 0.

    >>> import torch
    >>> round(float(sum_loss(torch.zeros(2, 4), torch.tensor([0, 3]), 0.0).total), 4)  # 2 ln 4
    2.7726
    """
    logits = logits.float()
    each = F.cross_entropy(logits, targets, reduction="none")
    log_partition = each + logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # cheaper than a second logsumexp
    cross_entropy = each.sum()
    penalty = z_loss * log_partition.square().sum()
    return LossParts(cross_entropy + penalty, cross_entropy.detach(), penalty.detach())


class LossError(RuntimeError):
    """Training has gone wrong; the message says what to try."""


class LossGuard:
    """Stops a run whose loss is non-finite, or exactly zero, `max_bad_steps` times in a row."""

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0

    def is_usable(self, loss: float, step: int) -> bool:
        """False: leave this step's update out.

        Raises:
            LossError: after `max_bad_steps` in a row.
        """
        if 0.0 < abs(loss) < float("inf"):
            self.bad_steps = 0
            return True
        self.bad_steps += 1
        if self.bad_steps >= self.max_bad_steps:
            raise LossError(
                f"step {step}: the loss was {loss} {self.bad_steps} times in a row; the last good checkpoint stands. "
                "Non-finite: lower the learning rate, or train in float32. Exactly zero: no target token carries "
                "loss (look at `flan-finetune inspect`), or the products overflowed (use bfloat16 or float32)."
            )
        return False
