"""Linear layers for the CPU: weights laid out once for its matrix kernels, as float32 or float16 (int8: int8_linear).

Activations and sums are float32 in all of them. What was measured on two AVX2 cores, [M, 512] x [512, 2048] on one
thread, microseconds:

| M | `F.linear` | float32 | float16 |
|---|---|---|---|
| 1 | 150 | 171 | 103 |
| 8 | 540 | 426 | 275 |
| 32 | 1,227 | 1,195 | 844 |
| 512 | 12,448 | 15,219 | 11,355 |
"""

from __future__ import annotations

import torch
from torch import Tensor

_PACK_ROWS = 32  # the batch size oneDNN lays the weights out for; measured good from 1 to 64 rows
_MAX_PACKED_ROWS, _ROW_STEP = 64, 8
_FLOAT16_MAX = 65504.0


def onednn_available() -> bool:
    """Whether float32 weights can be packed."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def fbgemm_available() -> bool:
    """Whether this processor has the kernels for float16 and int8 weights (x86 with AVX2)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class PackedLinear:
    """float32 weights in oneDNN's blocked layout, packed once: for the few rows of a decode step.

    The same float32 arithmetic as `F.linear`, up to 3 times faster for 2 to 64 rows, and a row's result does not
    depend on the number of rows. oneDNN keeps about half a megabyte of generated code for every number of rows it has
    seen, up to a thousand of them, so the numbers are few here: 1 to 8, then multiples of 8, and more than 64 rows go
    in pieces. That is also why encoders do not use it: theirs are ragged, and from 100 rows on it is no faster.
    """

    def __init__(self, weight: Tensor) -> None:
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows > _MAX_PACKED_ROWS:
            return torch.cat([self(piece) for piece in torch.split(x, _MAX_PACKED_ROWS)])
        missing = -rows % _ROW_STEP if rows > _ROW_STEP else 0
        if missing:
            padded = x.new_zeros(rows + missing, x.shape[1])
            padded[:rows] = x
            x = padded
        out: Tensor = self._product(x, self._weight, None, "none", [], "")
        return out[:rows] if missing else out


class Float16Linear:
    """Weights stored as float16, widened to float32 inside the kernel: half the memory to read.

    The rounding of the weights (2^-12 of each, below 6e-5 an absolute 3e-8) is all that differs from float32. A row's
    result depends on the number of rows only in the last bits of its sums, about 1e-6 of it.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in] float32; the caller has checked `fits`."""
        self._product = torch.ops.quantized.linear_dynamic_fp16.default
        self._weight = torch.ops.quantized.linear_prepack_fp16(weight, None)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether all weights are within float16's range; a trained T5's are, by four orders of magnitude."""
        return bool(weight.abs().max() <= _FLOAT16_MAX)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._product(x, self._weight)
        return out
