"""Linear layers whose weights lie as the native kernels read them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from serve.engine.int8_linear import quantized
from serve.engine.native.library import BytesTable, Kind, Level, LinearTable, address, level, loaded

BLOCK = 64  # outputs that lie together
_WIDTHS = 16  # inputs come in multiples of this
_ROWS = 2048  # more go in pieces: the room for quantized rows


class NativeLinear:
    """y = x W^T: float32 [rows, in] -> [rows, out]. A row's result is the same in every batch, bit for bit."""

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        """`weight` is [out, in] float32, `in` a multiple of 16; int8 kinds need Level.AVX512_VNNI."""
        self.outputs, self.inputs = weight.shape
        self.kind = kind
        blocks = -(-self.outputs // BLOCK)
        padded = torch.zeros(blocks * BLOCK, self.inputs)
        padded[: self.outputs] = weight
        self._scales = self._offsets = None
        if kind in (Kind.FLOAT32, Kind.FLOAT16):
            stored = padded if kind is Kind.FLOAT32 else padded.half()
            self._weight = stored.view(blocks, BLOCK, self.inputs).transpose(1, 2).contiguous()
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
        """Whether there are kernels for such a layer, and float16 for its numbers."""
        needed = Level.AVX2 if kind in (Kind.FLOAT32, Kind.FLOAT16) else Level.AVX512_VNNI
        in_range = kind is not Kind.FLOAT16 or bool(weight.abs().max() <= torch.finfo(torch.float16).max)
        return level() >= needed and weight.shape[1] % _WIDTHS == 0 and in_range

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        x = x.contiguous()
        out = torch.empty(rows, self._blocks * BLOCK)
        library, threads = loaded(), torch.get_num_threads()
        quantized_rows = min(rows, _ROWS) if self.kind >= Kind.INT8 else 0
        bytes_table, _room = room_for_bytes(quantized_rows, self.inputs)
        for start in range(0, rows, _ROWS):
            library.flan_linear(
                level(), threads, ctypes.byref(self.table), x.data_ptr() + 4 * start * self.inputs,
                min(_ROWS, rows - start), ctypes.byref(bytes_table), out.data_ptr() + 4 * start * out.shape[1],
            )  # fmt: skip
        return out if out.shape[1] == self.outputs else out[:, : self.outputs]


def room_for_bytes(rows: int, width: int) -> tuple[BytesTable, Tensor]:
    """Room for quantized rows; the table holds as long as the tensor does."""
    step = -(-width // 64) * 64
    room = torch.empty(rows * (2 * step + 4), dtype=torch.uint8)
    start = address(room)
    return BytesTable(start, start + rows * step, step, start + 2 * rows * step), room
