"""Packed rows to tensors: segment ids, shifted decoder inputs, loss weights - all derived here, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from finetune.packing import PackedRow

PAD_ID = 0  # T5's pad; it also starts every decoder


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Model features of some packed rows; int64, or float32 for the weights. Names as in T5X / SeqIO.

    encoder_input_tokens   [rows, input_length]    padded with 0
    encoder_segment_ids    [rows, input_length]    1, 2 ... per example, 0 on padding
    encoder_positions      [rows, input_length]    restart at 0 in each segment (for inspection; T5 needs none)
    decoder_target_tokens  [rows, target_length]   each segment ends in EOS
    decoder_input_tokens   [rows, target_length]   targets shifted right within each segment, starting with 0
    decoder_segment_ids, decoder_positions, decoder_loss_weights  [rows, target_length]
    """

    encoder_input_tokens: Tensor
    encoder_segment_ids: Tensor
    encoder_positions: Tensor
    decoder_target_tokens: Tensor
    decoder_input_tokens: Tensor
    decoder_segment_ids: Tensor
    decoder_positions: Tensor
    decoder_loss_weights: Tensor

    @property
    def num_target_tokens(self) -> int:
        return int(self.decoder_loss_weights.sum())

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(*(getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)))

    def rows(self, start: int, stop: int) -> PackedBatch:
        """Rows `start` to `stop`: a micro batch."""
        return PackedBatch(*(getattr(self, item.name)[start:stop] for item in fields(self)))


def collate(rows: Sequence[PackedRow], input_length: int, target_length: int) -> PackedBatch:
    """Rows to tensors.

    Two examples, [7 8 1] -> [5 1] and [9 1] -> [6 6 1], in one row of 6 inputs and 6 targets:

        encoder_input_tokens   7 8 1 9 1 0      decoder_target_tokens  5 1 6 6 1 0
        encoder_segment_ids    1 1 1 2 2 0      decoder_input_tokens   0 5 0 6 6 0
        encoder_positions      0 1 2 0 1 0      decoder_segment_ids    1 1 2 2 2 0
                                                decoder_positions      0 1 0 1 2 0
                                                decoder_loss_weights   1 1 1 1 1 0
    """
    inputs = torch.zeros(3, len(rows), input_length, dtype=torch.int64)
    targets = torch.zeros(4, len(rows), target_length, dtype=torch.int64)
    for index, row in enumerate(rows):
        read = written = 0
        for segment, example in enumerate(row.examples, start=1):
            source, target = example.encoder_input_tokens, example.decoder_target_tokens
            stop = read + len(source)
            inputs[0, index, read:stop] = torch.tensor(source)
            inputs[1, index, read:stop] = segment
            inputs[2, index, read:stop] = torch.arange(len(source))
            read, stop = stop, written + len(target)
            targets[0, index, written:stop] = torch.tensor(target)
            targets[1, index, written:stop] = torch.tensor((PAD_ID, *target[:-1]))
            targets[2, index, written:stop] = segment
            targets[3, index, written:stop] = torch.arange(len(target))
            written = stop
    return PackedBatch(
        encoder_input_tokens=inputs[0],
        encoder_segment_ids=inputs[1],
        encoder_positions=inputs[2],
        decoder_target_tokens=targets[0],
        decoder_input_tokens=targets[1],
        decoder_segment_ids=targets[2],
        decoder_positions=targets[3],
        decoder_loss_weights=(targets[2] > 0).float(),
    )
