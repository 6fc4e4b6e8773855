"""The parts a T5 is made of: linear layers (one class a device and dtype), norm, activation, relative position bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import Tensor

from serve.engine.int8_linear import delicate_int8_linear, int8_linear
from serve.engine.native import elementwise
from serve.engine.native.library import ACTIVATIONS, Kind, Level, level
from serve.engine.native.linear import NativeLinear
from serve.engine.packed_linear import Float16Linear, PackedLinear, onednn_available

WeightFormat = Literal["plain", "float16", "int16", "int8"]  # "plain": as the model's dtype says
_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_MANY_ROWS = 4  # fewer are done sooner in one operation than in five


class Linear(Protocol):
    """y = x W^T without bias: [..., in] -> [..., out]. The seam for packed and quantized weights."""

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseLinear:
    """The weights as they are, in the dtype of the model."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)


class Float32Linear:
    """float32 weights inside a float16 model: T5's `wo` overflows float16, so only its result is narrowed again."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.float()

    def __call__(self, x: Tensor) -> Tensor:
        limits = torch.finfo(x.dtype)
        return F.linear(x.float(), self._weight).clamp(limits.min, limits.max).to(x.dtype)


def make_linear(
    weight: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: WeightFormat = "plain",
    few_rows: bool,
    delicate: bool = False,
    native: bool = False,
) -> Linear:
    """The linear layer that suits the device and dtype. `weight` is [out, in] in any floating dtype.

    `weights` other than "plain" are for a float32 model on a CPU. `few_rows` marks a layer of the decode step,
    `delicate` one (T5's `wo`) whose activations overflow float16 and are too uneven for int8; float16 *weights* with
    float32 arithmetic, and int16 with its scale for 32 activations, do it no harm. int16 is float16 for a
    layer whose weights or width it does not suit, and without our own kernels.
    """
    if dtype is torch.float16 and delicate:
        return Float32Linear(weight.to(device))
    weight = weight.to(device=device, dtype=dtype).contiguous()
    kind = native_kind(weights, delicate=delicate)
    # With AVX2 alone, torch's kernels for many rows are as good.
    if native and (few_rows or level() > Level.AVX2):
        if kind is Kind.INT16 and not NativeLinear.fits(weight, kind):
            kind = Kind.FLOAT16
        if NativeLinear.fits(weight, kind):
            return NativeLinear(weight, kind)
    if weights == "int8":
        make = delicate_int8_linear if delicate else int8_linear
        linear = make(weight, few_rows=few_rows)
        if linear is not None:
            return linear
    if weights != "plain" and Float16Linear.fits(weight):
        return Float16Linear(weight)
    if few_rows and device.type == "cpu" and dtype is torch.float32 and onednn_available():
        return PackedLinear(weight)
    return DenseLinear(weight)


def native_kind(weights: WeightFormat, *, delicate: bool) -> Kind:
    """What the native kernels call a layer's weights."""
    if weights == "int8":
        return Kind.INT8_FINE if delicate else Kind.INT8
    return {"plain": Kind.FLOAT32, "float16": Kind.FLOAT16, "int16": Kind.INT16}[weights]


class RmsNorm:
    """T5's layer norm: no mean, no bias, statistics in float32. Shape and dtype of what comes in."""

    def __init__(self, weight: Tensor, epsilon: float, *, native: bool = False) -> None:
        self.weight = weight
        self._epsilon = epsilon
        self._native = native and weight.shape[0] % 16 == 0
        self._addend = torch.tensor(epsilon, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel, in float32 inside
            return F.rms_norm(x, self.weight.shape, self.weight, self._epsilon)
        if self._native:
            return elementwise.normalize(x, self.weight, self._epsilon)
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # F.rms_norm is the same in more passes
        inverse = torch.addcmul(self._addend, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        if x.dtype is torch.float32:
            return torch.mul(wide, inverse).mul_(self.weight)
        return self.weight * (wide * inverse).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation. As x * sigmoid(2 u), the same function, a CPU is up to twice as fast with it."""
    if x.is_cuda or x.dtype is not torch.float32 or x.shape[0] < _MANY_ROWS:
        return F.gelu(x, approximate="tanh")
    twice_u = (x * x).mul_(0.044715 * _GELU_SLOPE).add_(_GELU_SLOPE).mul_(x)
    return twice_u.sigmoid_().mul_(x)


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "silu": F.silu,
}


class Activation:
    """The feed-forward's activation over [rows, width]; gated: over [rows, 2 * width], whose first half gates."""

    def __init__(self, name: str, *, gated: bool, width: int, native: bool = False) -> None:
        self._name = name
        self._gated = gated
        self._function = ACTIVATION_FUNCTIONS[name]
        self._native = native and name in ACTIVATIONS and width % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        if self._native:
            return elementwise.activate(x, self._name, gated=self._gated)
        if not self._gated:
            return self._function(x)
        gate, linear = x.chunk(2, dim=-1)
        return self._function(gate).mul_(linear)


class RelativeBias:
    """T5's relative position bias of one stack, as a table by distance. Layer 0 owns it, all layers use it.

    Buckets saturate at `max_distance`, so a table over -max_distance..max_distance is exact for every distance.
    Distance here is key position minus query position. In a decoder (`causal`) later keys are impossible: -inf.
    """

    def __init__(self, weight: Tensor, *, max_distance: int, causal: bool, device: torch.device, dtype: torch.dtype):
        """`weight` is [num_buckets, heads], as stored."""
        distances = torch.arange(-max_distance, max_distance + 1)
        buckets = _buckets(distances, num_buckets=weight.shape[0], max_distance=max_distance, causal=causal)
        table = weight.float()[buckets].t().contiguous()
        if causal:
            table[:, distances > 0] = -math.inf
        self._max_distance = max_distance
        self._table = table.to(device=device, dtype=dtype)  # [heads, 2 * max_distance + 1]

    def at(self, distances: Tensor) -> Tensor:
        """Bias of integer `distances` of any shape: [heads, *shape]."""
        return self._table[:, distances.clamp(-self._max_distance, self._max_distance) + self._max_distance]

    def before(self) -> Tensor:
        """Bias of a key max_distance, ... 1, 0 positions before the query: [heads, max_distance + 1]."""
        return self._table[:, : self._max_distance + 1]

    def line(self, longest: int) -> Tensor:
        """Bias of distances 1 - longest ... longest - 1: [heads, 2 * longest - 1]."""
        return self.at(torch.arange(1 - longest, longest, device=self._table.device))

    def reversed_square(self, length: int) -> Tensor:
        """Bias of every query against every key, keys *last first*: [1, heads, length, length], without copying.

        In that order entry (i, j) depends on i + j alone, so overlapping strides over 2 * length - 1 numbers a head
        stand for the whole square, which for 2,048 tokens and 32 heads would take 512 MiB.
        """
        width = 2 * length - 1
        line = self.at(length - 1 - torch.arange(width, device=self._table.device)).contiguous()
        return line.as_strided((1, line.shape[0], length, length), (0, width, 1, 1))


def _buckets(distances: Tensor, *, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Bucket of each distance (key minus query): T5's formula, in float32 as in the reference implementation."""
    offset = torch.zeros_like(distances)
    if causal:
        magnitude = (-distances).clamp(min=0)
    else:
        num_buckets //= 2
        offset = (distances > 0).long() * num_buckets
        magnitude = distances.abs()
    exact = num_buckets // 2
    scaled = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (scaled * (num_buckets - exact)).long()
    far = far.clamp(max=num_buckets - 1)
    return offset + torch.where(magnitude < exact, magnitude, far)
