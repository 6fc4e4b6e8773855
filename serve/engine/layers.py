"""The parts a T5 is made of: linear layers (one class a device and dtype), norm, activation, relative position bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import Tensor

_PACK_ROWS = 32  # the batch size oneDNN lays the weights out for; measured good from 1 to 64 rows
_MAX_PACKED_ROWS, _ROW_STEP = 64, 8


class Linear(Protocol):
    """y = x W^T without bias: [..., in] -> [..., out]. The seam for packed and quantized weights."""

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseLinear:
    """The weights as they are, in the dtype of the model."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)


class PackedLinear:
    """float32 weights in oneDNN's blocked layout, packed once: for the few rows of a decode step.

    The same float32 arithmetic as `F.linear`, 2-3 times faster for 2 to 64 rows. oneDNN keeps about half a megabyte
    of generated code for every number of rows it has seen, up to a thousand of them, so the numbers are few here: 1
    to 8, then multiples of 8, and more than 64 rows go in pieces. That is also why encoders do not use it: theirs
    are ragged, and from 100 rows on it is no faster.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows > _MAX_PACKED_ROWS:
            return torch.cat([self(piece) for piece in torch.split(x, _MAX_PACKED_ROWS)])
        if rows <= _ROW_STEP:
            return self._product(x)
        return self._product(F.pad(x, (0, 0, 0, -rows % _ROW_STEP)))[:rows]

    def _product(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return out


class Float32Linear:
    """float32 weights inside a float16 model: T5's `wo` overflows float16, so only its result is narrowed again."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.float()

    def __call__(self, x: Tensor) -> Tensor:
        limits = torch.finfo(x.dtype)
        return F.linear(x.float(), self._weight).clamp(limits.min, limits.max).to(x.dtype)


def make_linear(
    weight: Tensor, *, device: torch.device, dtype: torch.dtype, few_rows: bool, keep_float32: bool = False
) -> Linear:
    """The linear layer that suits the device and dtype. `weight` is [out, in] in any floating dtype.

    `few_rows` marks a layer of the decode step, `keep_float32` one that float16 cannot hold.
    """
    if dtype is torch.float16 and keep_float32:
        return Float32Linear(weight.to(device))
    weight = weight.to(device=device, dtype=dtype).contiguous()
    if few_rows and device.type == "cpu" and dtype is torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return PackedLinear(weight)
    return DenseLinear(weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """T5's layer norm: no mean, no bias, statistics in float32. Shape and dtype of `x`."""
    if x.dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "silu": F.silu,
}


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
