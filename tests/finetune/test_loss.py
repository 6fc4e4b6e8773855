"""The loss in numbers, and the guard."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from finetune.loss import LossError, LossGuard, sum_loss


def test_equals_torch_and_is_a_sum() -> None:
    logits, targets = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 2, 2, 1])
    parts = sum_loss(logits, targets, 0.0)
    assert float(parts.total) == pytest.approx(float(F.cross_entropy(logits, targets, reduction="sum")), rel=1e-6)
    assert float(parts.z_loss) == 0.0


def test_z_loss_by_hand() -> None:
    parts = sum_loss(torch.zeros(2, 4), torch.tensor([0, 3]), 1e-4)
    assert float(parts.z_loss) == pytest.approx(2 * 1e-4 * math.log(4) ** 2, rel=1e-6)
    assert float(parts.total) == pytest.approx(float(parts.cross_entropy + parts.z_loss), rel=1e-6)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert sum_loss(logits, torch.zeros(300, dtype=torch.int64), 1e-4).total.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_the_guard_stops_after_its_limit(bad: float) -> None:
    guard = LossGuard(max_bad_steps=3)
    assert not guard.is_usable(bad, 1)
    assert guard.is_usable(2.5, 2)  # a good step between starts the count anew
    assert not guard.is_usable(bad, 3)
    assert not guard.is_usable(bad, 4)
    with pytest.raises(LossError, match=r"step 5: .*3 times in a row.*lower the learning rate"):
        guard.is_usable(bad, 5)
