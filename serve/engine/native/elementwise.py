"""What stands between two products, in one pass over memory each: T5's norm, and the feed-forward's activation."""

from __future__ import annotations

import torch
from torch import Tensor

from serve.engine.native.library import ACTIVATIONS, level, loaded

_FEW_NUMBERS = 8192  # fewer are done before a second thread is awake


def normalize(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """T5's norm of float32 [rows, width], both contiguous; `width` a multiple of 16."""
    rows, width = x.shape
    out = torch.empty_like(x)
    loaded().flan_normalize(
        level(), _threads(x), x.data_ptr(), weight.data_ptr(), epsilon, rows, width, out.data_ptr()
    )  # fmt: skip
    return out


def activate(x: Tensor, activation: str, *, gated: bool) -> Tensor:
    """float32 [rows, width], contiguous -> the same; gated: from [rows, 2 * width], whose first half gates."""
    rows, width = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    out = torch.empty(rows, width)
    loaded().flan_activate(
        level(), _threads(x), ACTIVATIONS[activation], gated, x.data_ptr(), rows, width, out.data_ptr()
    )  # fmt: skip
    return out


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _FEW_NUMBERS else 1
