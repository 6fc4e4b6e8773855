"""Linear layers whose weights lie as the native kernels read them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from serve.engine.int8_linear import quantized
from serve.engine.native.library import Kind, Level, LinearTable, QuantizedTable, address, level, loaded

BLOCK = 64  # outputs that lie together
_WIDTHS = 16  # inputs come in multiples of this
_GROUP, _INT16_MOST = 32, 8191  # as in types.h
_INT16_ROUNDING = 4e-4  # of a layer, relative, at most; float16's is 2e-4
_ROWS = 2048  # more go in pieces: the room for quantized rows


class NativeLinear:
    """y = x W^T: float32 [rows, in] -> [rows, out]. A row's result is the same in every batch, bit for bit."""

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        """`weight` is [out, in] float32, `in` a multiple of 16 (int16: of 32); integers need Level.AVX512_VNNI.

        int16 weights are -8191..8191 with a scale an output: rounded by less than 2^-14 of its largest, together no
        more than by float16's 11 bits of each. So are activations, with a scale for 32 of them and twice the bits
        where these are uneven.
        """
        self.outputs, self.inputs = weight.shape
        self.kind = kind
        blocks = -(-self.outputs // BLOCK)
        padded = torch.zeros(blocks * BLOCK, self.inputs)
        padded[: self.outputs] = weight
        self._scales = self._offsets = None
        if kind in (Kind.FLOAT32, Kind.FLOAT16):
            stored = padded if kind is Kind.FLOAT32 else padded.half()
            self._weight = stored.view(blocks, BLOCK, self.inputs).transpose(1, 2).contiguous()
        elif kind is Kind.INT16:
            numbers, self._scales = quantized(padded, _INT16_MOST)
            self._weight = numbers.view(blocks, BLOCK, self.inputs // 2, 2).transpose(1, 2).contiguous()
        else:
            numbers, self._scales = quantized(padded)
            self._offsets = numbers.sum(1, dtype=torch.int32) * 128
            self._weight = numbers.view(blocks, BLOCK, self.inputs // 4, 4).transpose(1, 2).contiguous()
        self.table = LinearTable(
            kind,
            self.inputs,
            blocks,
            address(self._weight),
            None if self._scales is None else address(self._scales),
            None if self._offsets is None else address(self._offsets),
        )
        self._blocks = blocks

    @staticmethod
    def fits(weight: Tensor, kind: Kind) -> bool:
        """Whether there are kernels for such a layer, and the kind for its numbers.

        float16 has a range. int16 has a scale an output, so it is for outputs without weights that dwarf the others:
        where its rounding is at most about twice float16's.
        """
        needed = Level.AVX512_VNNI if kind >= Kind.INT16 else Level.AVX2
        width = weight.shape[1]
        if level() < needed or width % (_GROUP if kind is Kind.INT16 else _WIDTHS) != 0:
            return False
        if kind is Kind.FLOAT16:
            return bool(weight.abs().max() <= torch.finfo(torch.float16).max)
        if kind is Kind.INT16:
            steps = weight.float().abs().amax(1) / _INT16_MOST
            rounding = steps.square().sum() * width / 12  # evenly spread within a step
            return bool(rounding <= _INT16_ROUNDING**2 * weight.float().square().sum())
        return True

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        x = x.contiguous()
        out = torch.empty(rows, self._blocks * BLOCK)
        library, threads = loaded(), torch.get_num_threads()
        quantized_rows = min(rows, _ROWS) if self.kind >= Kind.INT16 else 0
        table, _room = room_for_quantized(quantized_rows, self.inputs)
        for start in range(0, rows, _ROWS):
            library.flan_linear(
                level(), threads, ctypes.byref(self.table), x.data_ptr() + 4 * start * self.inputs,
                min(_ROWS, rows - start), ctypes.byref(table), out.data_ptr() + 4 * start * out.shape[1],
            )  # fmt: skip
        return out if out.shape[1] == self.outputs else out[:, : self.outputs]


def room_for_quantized(rows: int, width: int) -> tuple[QuantizedTable, Tensor]:
    """Room for rows as integers; the table holds as long as the tensor does."""
    step, scales_step = -(-width // 64) * 256, (-(-width // _GROUP) + 1) * 2
    room = torch.empty(rows * (step + 4 * scales_step), dtype=torch.uint8)
    start = address(room)
    return QuantizedTable(start, step, start + rows * step, scales_step), room


def whole_blocks(width: int) -> int:
    """`width`, or the outputs that the kernels write instead of so many."""
    return -(-width // BLOCK) * BLOCK
