"""The model: equal to Hugging Face's alone, and unmoved by what else is in the row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from finetune.checkpoints import write_model
from finetune.config import ModelConfig
from finetune.example import TokenExample
from finetune.model import T5, num_parameters, relative_buckets, segment_mask
from finetune.tokenization import DEMO_TOKENIZER
from tests.finetune.tiny import EXAMPLES, SHAPE, apart, make_model, one_row

T5_1_0 = replace(SHAPE, feed_forward_proj="relu", tie_word_embeddings=True)


def hugging_face(model: T5, folder: Path) -> Any:
    from transformers import T5ForConditionalGeneration

    write_model(folder, model, tokenizer=DEMO_TOKENIZER, dropout=0.1, card="", flan={})
    return T5ForConditionalGeneration.from_pretrained(folder).eval()


def loss_and_gradients(model: T5, *batches: Any) -> tuple[float, dict[str, Tensor]]:
    """Summed cross-entropy over all target tokens of the batches, and its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        targets = batch.decoder_target_tokens[batch.decoder_loss_weights > 0]
        loss = F.cross_entropy(model(batch), targets, reduction="sum")
        torch.autograd.backward(loss)
        total += loss.item()
    return total, {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.parametrize("config", [SHAPE, T5_1_0], ids=["T5 1.1", "T5 1.0"])
def test_logits_equal_hugging_face(config: ModelConfig, tmp_path: Path) -> None:
    model = make_model(config)
    reference = hugging_face(model, tmp_path)
    for example in EXAMPLES:
        batch = one_row(
            example,
            input_length=len(example.encoder_input_tokens),
            target_length=len(example.decoder_target_tokens),
        )
        with torch.no_grad():
            theirs = reference(input_ids=batch.encoder_input_tokens, labels=batch.decoder_target_tokens).logits[0]
            assert torch.allclose(model(batch), theirs, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    model = make_model()
    with torch.no_grad():
        tight, wide = (model(one_row(EXAMPLES[0], input_length=n, target_length=n)) for n in (6, 20))
    assert torch.allclose(tight, wide, atol=1e-5)


def test_packed_loss_and_gradients_are_the_unpacked_sums() -> None:
    model = make_model()
    packed, packed_gradients = loss_and_gradients(model, one_row(*EXAMPLES))
    alone, alone_gradients = loss_and_gradients(model, *(apart(example) for example in EXAMPLES))
    assert packed == pytest.approx(alone, rel=1e-6)
    assert packed_gradients.keys() == dict(model.named_parameters()).keys() == alone_gradients.keys()
    for name, gradient in packed_gradients.items():
        assert torch.allclose(gradient, alone_gradients[name], atol=1e-5, rtol=1e-4), name


def test_no_example_sees_another() -> None:
    """x2's logits do not move by a bit when x1 changes: encoder self, decoder self and cross-attention."""
    model = make_model()
    first, second, third = EXAMPLES
    other_inputs = TokenExample((31, 32, 33, 34, 35, 1), first.decoder_target_tokens, "a")
    other_targets = TokenExample(first.encoder_input_tokens, (41, 42, 43, 1), "a")
    where = slice(len(first.decoder_target_tokens), None)
    with torch.no_grad():
        expected = model(one_row(first, second, third))[where]
        for changed in (other_inputs, other_targets):
            assert torch.equal(model(one_row(changed, second, third))[where], expected)
        moved = model(one_row(other_inputs, second, third))[: len(first.decoder_target_tokens)]
        assert not torch.allclose(moved, model(one_row(first, second, third))[: len(first.decoder_target_tokens)])


def test_no_target_sees_a_later_one() -> None:
    model = make_model()
    long, short = (8, 9, 77, 1), (8, 9, 50, 60)
    with torch.no_grad():
        logits = [model(one_row(TokenExample((5, 6, 1), targets, "a"))) for targets in (long, short)]
    assert torch.equal(logits[0][:3], logits[1][:3])  # 77 and 50 are read at the fourth position only


def test_masks_by_hand() -> None:
    segments = torch.tensor([[1, 1, 2, 0]])
    seen = segment_mask(segments, segments)[0, 0] == 0
    assert seen.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_hugging_face(bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 300)
    ours = relative_buckets(distance, bidirectional=bidirectional, num_buckets=32, max_distance=128)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    assert torch.equal(ours, theirs)


def test_dropout_only_in_training_and_as_set() -> None:
    model = make_model()
    model.set_dropout(0.5)
    batch = one_row(*EXAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch))
        model.train()
        assert not torch.equal(model(batch), model(batch))
        model.set_dropout(0.0)
        assert torch.equal(model(batch), make_model()(batch))


def test_parameter_counts_of_the_published_shapes() -> None:
    with torch.device("meta"):
        small = T5(ModelConfig(32128, 512, 1024, 8, 8, 6, 64))
    assert num_parameters(small) == pytest.approx(77.0e6, rel=1e-3)


def test_initial_weights_are_seeded_and_scaled() -> None:
    model, same, other = make_model(), make_model(), make_model(seed=1)
    q, k = (model.get_parameter(f"encoder.block.0.layer.0.SelfAttention.{name}.weight") for name in "qk")
    assert torch.equal(q, same.get_parameter("encoder.block.0.layer.0.SelfAttention.q.weight"))
    assert not torch.equal(q, other.get_parameter("encoder.block.0.layer.0.SelfAttention.q.weight"))
    assert float(k.detach().std() / q.detach().std()) == pytest.approx(SHAPE.d_kv**0.5, rel=0.2)
