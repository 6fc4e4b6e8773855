"""The encoder in C is the one in torch: same states, same keys and values, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve.engine.layers import WeightFormat
from serve.engine.loading import load_model
from serve.engine.model import T5Model
from serve.engine.native.encoder import NativeEncoder
from serve.engine.native.library import Kind, Level, level, limited
from serve.engine.native.linear import NativeLinear
from serve.engine.weights import load_checkpoint
from tests.engine.checkpoints import make_t5_checkpoint
from tests.engine.test_model import random_prompts

LEVELS = [some for some in Level if Level.AVX2 < some <= level()]  # with AVX2 alone torch encodes
pytestmark = pytest.mark.skipif(not LEVELS, reason="the kernels are not built, or not for this processor")
CPU = torch.device("cpu")
LENGTHS = (1, 16, 63, 64, 65, 200, 3, 300)  # around every edge, and more than one piece of each kind


@pytest.fixture(params=LEVELS, ids=lambda some: some.name)
def kernels(request: pytest.FixtureRequest) -> Iterator[Level]:
    with limited(request.param), torch.inference_mode():
        yield request.param


def encoder_of(model: T5Model) -> NativeEncoder:
    assert model.native_encoder is not None
    return model.native_encoder


def cache_for(model: T5Model, lengths: tuple[int, ...]) -> Tensor:
    """NaN all over: [layers, 2, texts, heads, longest + 7, d_kv]."""
    config = model.config
    return torch.full(
        (config.num_decoder_layers, 2, len(lengths), config.num_heads, max(lengths) + 7, config.d_kv),
        torch.nan,
        dtype=model.cache_row.dtype,
    )


def rows_for(model: T5Model, lengths: tuple[int, ...], cache: Tensor | None = None) -> list[Tensor]:
    """Where keys and values go: views of something wider, as the cache's are."""
    wide = cache_for(model, lengths) if cache is None else cache
    return [wide[:, :, number, :, :length] for number, length in enumerate(lengths)]


@pytest.mark.parametrize("kind", ["t5", "t5_v1_1", "mt5"])
@pytest.mark.parametrize("weights", ["plain", "float16", "int16", "int8"])
def test_states_keys_and_values_are_those_of_torch(
    kernels: Level, kind: str, weights: WeightFormat, tmp_path: Path
) -> None:
    if weights.startswith("int") and kernels is not Level.AVX512_VNNI:
        pytest.skip("integer layers are for VNNI")
    model = load_model(make_t5_checkpoint(tmp_path, kind), device=CPU, dtype=torch.float32, weights=weights)  # type: ignore[arg-type]
    prompts = random_prompts(LENGTHS, 380)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    cache = cache_for(model, LENGTHS)
    rows = rows_for(model, LENGTHS, cache)
    states = encoder_of(model)(ids, LENGTHS, rows)
    # Layer by layer: the same linear layers, called from torch. int8 turns a last bit into a level now and then.
    expected = model.encode(ids, LENGTHS, model._ragged_attention(LENGTHS, causal=False))
    tolerance = 0.05 if weights == "int8" else 2e-3 if weights == "int16" else 1e-4
    assert torch.allclose(states, expected, rtol=tolerance, atol=tolerance)
    for layer, keys_values in enumerate(model.cross_keys_values(states)):
        parts = torch.split(keys_values.permute(1, 2, 0, 3), list(LENGTHS), dim=2)
        for row, part in zip(rows, parts, strict=True):
            assert torch.equal(row[layer], part.to(model.cache_row.dtype))
    for number, length in enumerate(LENGTHS):
        assert bool(cache[:, :, number, :, length:].isnan().all())


@pytest.mark.parametrize("weights", ["plain", "float16", "int16", "int8"])
def test_alone_equals_in_a_crowd_bit_for_bit(weights: WeightFormat, small_folder: Path) -> None:
    if weights.startswith("int") and level() is not Level.AVX512_VNNI:
        pytest.skip("integer layers are for VNNI")
    model = load_model(small_folder, device=CPU, dtype=torch.float32, weights=weights)
    prompts = random_prompts(LENGTHS, 380)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    rows = rows_for(model, LENGTHS)
    before, start = torch.get_num_threads(), 0
    crowd = encoder_of(model)(ids, LENGTHS, rows)
    for number, (prompt, length) in enumerate(zip(prompts, LENGTHS, strict=True)):
        torch.set_num_threads(1 + number % 3)
        try:
            own = rows_for(model, (length,))
            alone = encoder_of(model)(torch.tensor(prompt), [length], own)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(alone, crowd[start : start + length])
        assert torch.equal(own[0], rows[number])
        start += length


def test_states_alone_need_no_rows(small_folder: Path) -> None:
    model = load_model(small_folder, device=CPU, dtype=torch.float32)
    (prompt,) = random_prompts((40,), 380)
    rows = rows_for(model, (40,))
    assert torch.equal(
        encoder_of(model)(torch.tensor(prompt), [40]), encoder_of(model)(torch.tensor(prompt), [40], rows)
    )
    assert torch.equal(model.encode(torch.tensor(prompt), [40]), encoder_of(model)(torch.tensor(prompt), [40]))


def test_keys_beyond_float16_become_its_largest_number(small_folder: Path) -> None:
    model = load_model(small_folder, device=CPU, dtype=torch.float32, weights="float16")
    model._encoder_norm.weight.mul_(1e8)
    (prompt,) = random_prompts((20,), 380)
    rows = rows_for(model, (20,))
    encoder_of(model)(torch.tensor(prompt), [20], rows)
    assert bool(rows[0].isfinite().all())
    assert float(rows[0].abs().max()) == torch.finfo(torch.float16).max


def test_layers_of_several_kinds_stand_beside_each_other(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do where some layers' weights do not suit int16: here the first layer's keys and values."""
    if level() is not Level.AVX512_VNNI:
        pytest.skip("integer layers are for VNNI")
    checkpoint = load_checkpoint(small_folder)
    monkeypatch.setattr("serve.engine.native.linear._INT16_ROUNDING", 1.8e-4)  # 64 numbers cannot be very uneven
    for name in ("k", "v"):
        checkpoint.tensors[f"decoder.block.0.layer.1.EncDecAttention.{name}.weight"][:, 3] *= 1000
    model = T5Model(checkpoint, device=CPU, dtype=torch.float32, weights="int16")
    kinds = [layer.cross.kv.kind for layer in model._decoder if isinstance(layer.cross.kv, NativeLinear)]
    assert kinds == [Kind.FLOAT16, Kind.INT16]
    (prompt,) = random_prompts((40,), 380)
    rows = rows_for(model, (40,))
    states = encoder_of(model)(torch.tensor(prompt), [40], rows)
    for layer, keys_values in enumerate(model.cross_keys_values(states)):
        assert torch.equal(rows[0][layer], keys_values.permute(1, 2, 0, 3).to(model.cache_row.dtype))


def test_rows_that_the_kernel_would_misread_are_refused(small_folder: Path) -> None:
    model = load_model(small_folder, device=CPU, dtype=torch.float32)
    (prompt,) = random_prompts((20,), 380)
    good = rows_for(model, (20,))[0]
    for bad in (good.double(), good[:, :, :, :19], good.transpose(3, 4).contiguous().transpose(3, 4)):
        with pytest.raises(ValueError, match="a row of"):
            encoder_of(model)(torch.tensor(prompt), [20], [bad])
    with pytest.raises(ValueError, match="longer"):
        encoder_of(model)(torch.tensor(prompt), [12, 8], rows_for(model, (12,)))
