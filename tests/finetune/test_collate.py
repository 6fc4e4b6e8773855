"""Rows to tensors: the docstring's worked example, and what must hold for any rows."""

from __future__ import annotations

import torch

from finetune.collate import PAD_ID, collate
from finetune.example import TokenExample
from finetune.packing import PackedRow
from tests.finetune.tiny import EXAMPLES, one_row


def test_the_worked_example() -> None:
    row = PackedRow((TokenExample((7, 8, 1), (5, 1), "a"), TokenExample((9, 1), (6, 6, 1), "b")))
    batch = collate([row], input_length=6, target_length=6)
    assert batch.encoder_input_tokens.tolist() == [[7, 8, 1, 9, 1, 0]]
    assert batch.encoder_segment_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.encoder_positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.decoder_target_tokens.tolist() == [[5, 1, 6, 6, 1, 0]]
    assert batch.decoder_input_tokens.tolist() == [[0, 5, 0, 6, 6, 0]]
    assert batch.decoder_segment_ids.tolist() == [[1, 1, 2, 2, 2, 0]]
    assert batch.decoder_positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.decoder_loss_weights.tolist() == [[1, 1, 1, 1, 1, 0]]


def test_every_segment_starts_with_pad_and_ends_in_eos_with_loss() -> None:
    batch = one_row(*EXAMPLES)
    starts = batch.decoder_positions.eq(0) & batch.decoder_segment_ids.gt(0)
    assert batch.decoder_input_tokens[starts].tolist() == [PAD_ID] * 3
    ends = batch.decoder_target_tokens.eq(1)
    assert int(ends.sum()) == 3
    assert batch.decoder_loss_weights[ends].tolist() == [1.0] * 3


def test_a_pad_id_inside_a_target_still_carries_loss() -> None:
    batch = one_row(TokenExample((5, 1), (8, 0, 1), "a"))
    assert batch.num_target_tokens == 3


def test_micro_batches_are_rows() -> None:
    batch = collate([PackedRow((example,)) for example in EXAMPLES], 9, 7)
    assert torch.equal(batch.rows(1, 3).encoder_input_tokens, batch.encoder_input_tokens[1:3])
    assert batch.num_target_tokens == sum(len(example.decoder_target_tokens) for example in EXAMPLES)
    assert batch.to(torch.device("cpu")).num_target_tokens == batch.num_target_tokens
