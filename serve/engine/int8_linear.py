"""Linear layers with int8 weights for the CPU: one scale an output, and for the activations one scale a *row*.

torch's own dynamic quantization has one scale for all activations, so a row's result would depend on its neighbours.
Here every row is divided by its largest magnitude, so one constant scale fits all, and multiplied again afterwards:
the sums are integers, and a row's result is the same in every batch, bit for bit.

Activations have 8 bits where the processor sums their products in 32 (VNNI), else 7, and two such numbers, the
second for what the first leaves over, where 8 bits do not fit them (T5's `wo`, the *fine* ones).

What was measured on an AVX-512 core with VNNI, one thread, microseconds, [M, 512] x [512, 2048], the weights in memory
for few rows, in the cache for many:

| M | float16-stored | FBGEMM | oneDNN |
|---|---|---|---|
| 1 | 106 | 68 | 102 |
| 8 | 210 | 76 | 117 |
| 32 | 706 | 213 | 222 |
| 128 | 2,633 | 894 | 625 |
| 512 | 10,405 | 4,079 | 2,768 |
"""

from __future__ import annotations

import math
import warnings
from typing import Protocol

import torch
from torch import Tensor

from serve.engine.packed_linear import Float16Linear


class Int8Linear(Protocol):
    """y = x W^T: float32 [rows, in] -> [rows, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product, and how far what it was made of is from each row of `x`: Euclidean, [rows, 1]."""
        ...


def vnni_available() -> bool:
    """Whether the processor sums products of 8-bit activations and int8 weights in 32 bits, so exactly, and fast."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())  # type: ignore[no-untyped-call]


def int8_linear(weight: Tensor, *, few_rows: bool) -> Int8Linear:
    """The faster one of this processor. `weight` is [out, in] float32; `few_rows`: it is for decode steps."""
    return FbgemmLinear(weight) if few_rows or not vnni_available() else OneDnnLinear(weight)


def delicate_int8_linear(weight: Tensor, *, few_rows: bool) -> Int8Linear | Float16Linear | None:
    """int8 weights for activations that 8 bits do not fit, else float16 ones; None where they fit neither."""
    if vnni_available():
        return FbgemmLinear(weight, fine=True) if few_rows else OneDnnLinear(weight, fine=True)
    return Float16Linear(weight) if Float16Linear.fits(weight) else None


class FbgemmLinear:
    """FBGEMM's kernels, the faster ones for few rows, and there for every processor with AVX2.

    Without VNNI these add pairs of products in 16 bits, which 2 x 127 x 127 just fit: so 7 bits there.
    """

    def __init__(self, weight: Tensor, *, fine: bool = False, bits: int | None = None) -> None:
        """`bits` of the activations are 7 or 8; None: what this processor allows."""
        self._product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        numbers, scales = quantized(weight)
        with warnings.catch_warnings():  # torch announces the end of quantized tensors; our torch is pinned
            warnings.simplefilter("ignore", UserWarning)
            zeros = torch.zeros(weight.shape[0], dtype=torch.long)
            stored = torch._make_per_channel_quantized_tensor(numbers, scales.double(), zeros, 0)
        self._weight = torch.ops.quantized.linear_prepack(stored, None)
        bits = bits if bits is not None else 8 if vnni_available() else 7
        self._zero_point = 2 ** (bits - 1)
        self._levels = self._zero_point - 1
        self._fine = fine

    def __call__(self, x: Tensor) -> Tensor:
        return self._scaled(x)[0]

    def with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, unit, largest = self._scaled(x)
        return out, self._rest(unit).norm(dim=1, keepdim=True).mul_(largest / self._levels)

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest = _largest(x)
        unit = x / largest  # a row of zeros is NaN here, any integers in the product, and zero again at the end
        out: Tensor = self._product(unit, 1.0 / self._levels, self._zero_point, self._weight)
        if self._fine:
            rest: Tensor = self._product(self._rest(unit), 0.5 / self._levels, self._zero_point, self._weight)
            out.add_(rest, alpha=1.0 / self._levels)
        return out.mul_(largest), unit, largest

    def _rest(self, unit: Tensor) -> Tensor:
        """What is lost of divided rows, in levels: -0.5..0.5."""
        levels = unit * self._levels
        rest: Tensor = levels - levels.round()
        return rest


class OneDnnLinear:
    """oneDNN's kernels, the faster ones for many rows, on a processor with VNNI.

    oneDNN generates code for every number of rows it has seen and keeps it, so the numbers are few here: 1 to 8,
    multiples of 8 up to 64, and multiples of 64 up to 512; more rows go in pieces, which stay in the cache.
    """

    _LEVELS, _ZERO_POINT = 127, 128  # activations are -127..127
    _SHIFT = 1.5 * 2**23 + _ZERO_POINT  # added to a small float32 it leaves the rounded number in the lowest byte
    _MAX_ROWS = 512

    def __init__(self, weight: Tensor, *, fine: bool = False) -> None:
        self._product = torch.ops.onednn.qlinear_pointwise.default
        numbers, self._scales = quantized(weight)
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.long)
        self._weight = torch.ops.onednn.qlinear_prepack(numbers, None)
        self._outputs = weight.shape[0]
        self._fine = fine

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], self._outputs)
        for rows, into in zip(torch.split(x, self._MAX_ROWS), torch.split(out, self._MAX_ROWS), strict=True):
            self._fill(into, rows)
        return out

    def with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exact, shifted, largest = self._shifted(x)
        return self(x), self._rest(exact, shifted).norm(dim=1, keepdim=True).mul_(largest / self._LEVELS)

    def _fill(self, out: Tensor, x: Tensor) -> None:
        """`out` [rows, out] is the product of up to _MAX_ROWS rows."""
        exact, shifted, largest = self._shifted(x)
        product = self._multiply(shifted, 1.0 / self._LEVELS)
        if self._fine:
            rest = self._rest(exact, shifted).mul_(2 * self._LEVELS).add_(self._SHIFT)
            product.add_(self._multiply(rest, 0.5 / self._LEVELS**2))
        torch.mul(product[: x.shape[0]], largest, out=out)

    def _shifted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` in levels, the same with the rounded numbers in the lowest bytes, and the rows' largest magnitudes."""
        largest = _largest(x)
        # A row of zeros is NaN here, any integers in the product, and zero again at the end.
        exact = x * (self._LEVELS / largest)
        return exact, exact + self._SHIFT, largest

    def _rest(self, exact: Tensor, shifted: Tensor) -> Tensor:
        """What is lost, in levels: -0.5..0.5. The arguments are used up."""
        return exact.sub_(shifted.sub_(self._SHIFT))

    def _multiply(self, shifted: Tensor, scale: float) -> Tensor:
        """[rows, in] with the numbers in the lowest bytes -> [rows or a few more, out]."""
        rows, width = shifted.shape
        step = 1 if rows <= 8 else 8 if rows <= 64 else 64
        numbers = torch.empty(rows + -rows % step, width, dtype=torch.uint8)
        numbers[:rows] = shifted.view(torch.int32)
        out: Tensor = self._product(
            numbers, scale, self._ZERO_POINT, self._weight, self._scales, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return out


def quantized(weight: Tensor, most: int = 127) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] as integers -most..most (int8, or int16 beyond 127), and its scales [out] float32."""
    scales = (weight.abs().amax(1).double() / most).clamp_(min=1e-30)
    numbers = (weight / scales[:, None]).round_().clamp_(-most, most)
    return numbers.to(torch.int8 if most <= 127 else torch.int16), scales.float()


def _largest(x: Tensor) -> Tensor:
    """Each row's largest magnitude: [rows, 1]. For many rows several times as fast as a norm."""
    if x.shape[0] > 1:
        return x.abs().amax(-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(x, math.inf, -1, keepdim=True)
    return norm
