"""From Python's numbers to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | npt.NDArray[Any], device: torch.device, *, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of `values` on `device`; `dtype` None is torch's choice.

    To a CUDA device by way of page-locked memory: a copy from ordinary memory makes the host wait until everything
    before it has run.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
