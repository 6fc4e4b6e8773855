"""Which format a `--dtype` is on which device, and what the packed ones promise: near float32, alone as in a crowd."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.checkpoint import DEMO_FOLDER
from serve.engine import number_format
from serve.engine.int8_linear import FbgemmLinear, Int8Linear, OneDnnLinear, vnni_available
from serve.engine.layers import WeightFormat, make_linear
from serve.engine.loading import load_model
from serve.engine.model import T5Model
from serve.engine.native.library import Level
from serve.engine.number_format import NumberFormat
from serve.engine.packed_linear import Float16Linear, PackedLinear, fbgemm_available, onednn_available
from serve.engine.shortlist_head import MIN_VOCABULARY, ShortlistHead
from serve.sampling_params import SamplingParams
from tests.engine.checkpoints import make_t5_checkpoint
from tests.engine.driving import drain, engine_of
from tests.engine.test_crowd import check_against_alone, make_guests, play
from tests.engine.test_model import greedy, random_prompts

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("kernels")
FORMATS: tuple[WeightFormat, ...] = ("float16", "int16", "int8")  # int16 without our kernels is float16
needs_fbgemm = pytest.mark.skipif(not fbgemm_available(), reason="no packed kernels on this processor")


def loaded(folder: Path, weights: WeightFormat, vocab_limit: int | None = None) -> T5Model:
    return load_model(folder, device=CPU, dtype=torch.float32, weights=weights, vocab_limit=vocab_limit)


def test_formats_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_format, "fbgemm_available", lambda: True)
    monkeypatch.setattr(number_format, "level", lambda: Level.AVX512_VNNI)
    assert NumberFormat.of("auto", "cpu") == NumberFormat("int16", torch.float32, "int16")
    assert NumberFormat.of("float16", "cpu") == NumberFormat("float16", torch.float32, "float16")
    assert NumberFormat.of("int8", "cpu") == NumberFormat("int8", torch.float32, "int8")
    assert NumberFormat.of("float32", "cpu") == NumberFormat("float32", torch.float32, "plain")
    assert NumberFormat.of("bfloat16", "cpu") == NumberFormat("bfloat16", torch.bfloat16, "plain")
    assert NumberFormat.of("auto", "cpu", packs=False) == NumberFormat("float32", torch.float32, "plain")
    assert NumberFormat.of("auto", "cuda") == NumberFormat("bfloat16", torch.bfloat16, "plain")
    assert NumberFormat.of("float16", "cuda") == NumberFormat("float16", torch.float16, "plain")
    for name in ("int16", "int8"):
        with pytest.raises(ValueError, match=f"{name} is not supported on cuda"):
            NumberFormat.of(name, "cuda")


def test_int16_is_for_processors_with_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_format, "fbgemm_available", lambda: True)
    monkeypatch.setattr(number_format, "level", lambda: Level.AVX512)
    assert NumberFormat.of("auto", "cpu") == NumberFormat("float16", torch.float32, "float16")
    with pytest.raises(ValueError, match=r"int16 is not supported on cpu here; use float32, bfloat16, float16, int8$"):
        NumberFormat.of("int16", "cpu")


def test_without_packed_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_format, "fbgemm_available", lambda: False)
    assert NumberFormat.of("auto", "cpu") == NumberFormat("float32", torch.float32, "plain")
    assert NumberFormat.of("float16", "cpu") == NumberFormat("float16", torch.float16, "plain")
    with pytest.raises(ValueError, match=r"int8 is not supported on cpu here; use float32, bfloat16, float16$"):
        NumberFormat.of("int8", "cpu")


def test_sums_beyond_float16_stay_finite_in_the_layer_that_has_them() -> None:
    """T5's `wo`: multiplied in float32 inside a float16 model."""
    weight = torch.full((4, 512), 1.0)
    x = torch.full((2, 512), 300.0, dtype=torch.float16)  # 512 * 300 is more than float16 has
    kept = make_linear(weight, device=CPU, dtype=torch.float16, few_rows=False, delicate=True)
    assert kept(x).dtype is torch.float16
    assert torch.equal(kept(x), torch.full((2, 4), torch.finfo(torch.float16).max, dtype=torch.float16))
    plain = make_linear(weight, device=CPU, dtype=torch.float16, few_rows=False)
    assert torch.isinf(plain(x)).all(), "else this layer would need no care"


@needs_fbgemm
def test_int8_does_not_lose_small_activations_beside_great_ones_where_t5_has_them() -> None:
    """T5's `wo`: a few of its activations are a thousand times the others, which 8 bits of the greatest would drop."""
    generator = torch.Generator().manual_seed(6)
    weight, x = torch.randn(64, 512, generator=generator), torch.randn(9, 512, generator=generator)
    x[:, 7], weight[:, 7] = 1000.0, 0.0
    exact = x.double() @ weight.double().t()
    errors = {}
    for delicate in (False, True):
        layer = make_linear(weight, device=CPU, dtype=torch.float32, weights="int8", few_rows=False, delicate=delicate)
        errors[delicate] = float((layer(x) - exact).norm() / exact.norm())
    assert errors[False] > 0.5
    assert errors[True] < 0.02


@needs_fbgemm
@pytest.mark.parametrize("weights", FORMATS)
def test_crowd_equals_alone(small_folder: Path, weights: WeightFormat) -> None:
    model = loaded(small_folder, weights, vocab_limit=380)
    guests = make_guests(32, seed=3, max_prompt=300, max_tokens=40)
    results, runner, _ = play(model, guests, max_running_sequences=24, encode_tokens_per_step=512)
    assert check_against_alone(model, guests, results) <= 3
    assert max(runner.decode_sizes) > 8


@needs_fbgemm
@pytest.mark.parametrize(("weights", "tolerance"), [("float16", 2e-2), ("int16", 2e-2), ("int8", 0.5)])
def test_logits_stay_near_float32(small_folder: Path, model: T5Model, weights: WeightFormat, tolerance: float) -> None:
    prompts = random_prompts((8, 40, 200), 380)
    _, wide = greedy(model, prompts, 1)
    _, narrow = greedy(loaded(small_folder, weights, vocab_limit=380), prompts, 1)
    for ours, exact in zip(narrow, wide, strict=True):
        difference = (ours - exact).abs().max()
        assert 0.0 < difference < tolerance  # 0 would mean that the format was not in use


@needs_fbgemm
@pytest.mark.parametrize(("weights", "least"), [("float16", 0.998), ("int16", 0.998), ("int8", 0.98)])
def test_the_demo_says_the_same_as_in_float32(weights: WeightFormat, least: float) -> None:
    """Greedy agreement on a trained model: the share of positions, teacher-forced by float32's own text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER, local_files_only=True)
    texts = [f"What is {a} + {b}? Let's think step by step." for a in range(11, 51, 7) for b in range(5, 50, 9)]
    texts += ["Find the odd one out. lemonade, spinach, garlic, broccoli", "Which word is the longest? cat, horse, ox"]
    prompts = [tuple(tokenizer(text).input_ids) for text in texts]
    exact, packed = loaded(DEMO_FOLDER, "plain"), loaded(DEMO_FOLDER, weights)
    said, total, equal = generated(exact, prompts), 0, 0
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, said, strict=True):
            best = [forced_best(model, prompt, tokens) for model in (exact, packed)]
            total += len(tokens)
            equal += int((best[0] == best[1]).sum())
    assert total > 300
    assert equal >= least * total


def generated(model: T5Model, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    engine = engine_of(model)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), [prompt], SamplingParams(max_tokens=40))
    results = drain(engine)
    return [results.sequences[str(number), 0].token_ids for number in range(len(prompts))]


def forced_best(model: T5Model, prompt: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """The best token at each position after `tokens` so far: [tokens]."""
    states = model.encode(torch.tensor(prompt), [len(prompt)])
    cross = [keys_values.permute(1, 2, 0, 3) for keys_values in model.cross_keys_values(states)]
    inputs = torch.tensor([model.config.decoder_start_token_id, *tokens[:-1]])
    return model.logits(model.decode_forced(inputs, [len(tokens)], cross)).argmax(-1)


Int8 = Callable[[torch.Tensor], Int8Linear]
needs_vnni = pytest.mark.skipif(not vnni_available(), reason="no VNNI on this processor")
INT8: list[Any] = [
    pytest.param(partial(FbgemmLinear, bits=7), marks=needs_fbgemm, id="fbgemm7"),
    pytest.param(FbgemmLinear, marks=[needs_fbgemm, needs_vnni], id="fbgemm"),
    pytest.param(partial(FbgemmLinear, fine=True), marks=[needs_fbgemm, needs_vnni], id="fbgemm-fine"),
    pytest.param(OneDnnLinear, marks=needs_vnni, id="onednn"),
    pytest.param(partial(OneDnnLinear, fine=True), marks=needs_vnni, id="onednn-fine"),
]
BITS = (6, 7, 14, 7, 14)  # of a magnitude


@pytest.mark.parametrize("kind", INT8)
def test_int8_rows_do_not_see_their_neighbours(kind: Int8) -> None:
    """Bit for bit, whatever the neighbours' scale and number; a row of zeros is zero."""
    generator = torch.Generator().manual_seed(0)
    layer = kind(torch.randn(96, 64, generator=generator))
    x = torch.randn(1100, 64, generator=generator) * torch.logspace(-3, 3, 1100)[:, None]
    x[5] = 0.0
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(alone[5], torch.zeros(96))
    for rows in (2, 9, 64, 65, 130, 1100):
        assert torch.equal(layer(x[:rows]), alone[:rows])


@pytest.mark.parametrize(
    ("kind", "bits"),
    [pytest.param(*kind.values, bits, marks=kind.marks) for kind, bits in zip(INT8, BITS, strict=True)],
)
def test_int8_activations_keep_their_bits(kind: Int8, bits: int) -> None:
    """With weights that int8 holds exactly: a row is off by at most half a level of its largest, and it says so."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randint(-127, 128, (40, 64), generator=generator).float()
    weight[:, 0] = 127.0
    layer, x = kind(weight), torch.randn(70, 64, generator=generator)
    out, loss = layer.with_loss(x)
    assert torch.equal(out, layer(x))
    exact = x.double() @ weight.double().t()
    level = x.abs().amax(1, keepdim=True) / (2**bits - 1)
    error = (out - exact).abs()
    assert bool((error <= 0.51 * level * weight.abs().sum(1)).all())
    assert float(error.max()) > 0.0
    if bits < 14:  # the loss of the finest is that of its first numbers
        assert bool((error <= loss * weight.norm(dim=1) * 1.0001 + 1e-3).all())
        assert bool((loss <= 0.51 * level * 64**0.5).all())


@pytest.mark.parametrize("kind", INT8)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_int8_rows_that_are_not_finite_stay_so_alone(kind: Int8, bad: float) -> None:
    generator = torch.Generator().manual_seed(5)
    layer, x = kind(torch.randn(32, 64, generator=generator)), torch.randn(12, 64, generator=generator)
    fine = layer(x)
    x[3, 7] = bad
    out = layer(x)
    assert not bool(out[3].isfinite().any())
    others = [n for n in range(12) if n != 3]
    assert torch.equal(out[others], fine[others])


@needs_fbgemm
def test_float16_weights_round_no_more_than_float16() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(96, 64, generator=generator), torch.randn(9, 64, generator=generator)
    expected = x.double() @ weight.half().double().t()
    assert torch.allclose(Float16Linear(weight)(x).double(), expected, atol=1e-5)
    assert not torch.allclose(expected, x.double() @ weight.double().t(), atol=1e-5)
    assert not Float16Linear.fits(weight * 1e5)


@pytest.mark.skipif(not onednn_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("rows", [1, 7, 9, 64, 65, 200])
def test_packed_float32_is_float32(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(48, 32, generator=generator), torch.randn(rows, 32, generator=generator)
    out = PackedLinear(weight)(x)
    assert out.shape == (rows, 48)
    assert torch.allclose(out, x @ weight.t(), atol=1e-5)


@needs_fbgemm
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_the_shortlist_has_the_best_token(spread: float) -> None:
    """Always, not mostly: with `spread` small the best are so close that int8 alone would often be wrong."""
    generator = torch.Generator().manual_seed(2)
    vocabulary, width = MIN_VOCABULARY + 77, 64
    common = torch.randn(width, generator=generator)
    weight = common + spread * torch.randn(vocabulary, width, generator=generator)
    states = torch.randn(64, width, generator=generator)
    found = ShortlistHead(weight)(states)
    exact = states @ weight.t()
    sure = ~found.crowded
    assert torch.equal(found.token_ids[sure], exact[sure].argmax(-1))
    assert torch.allclose(found.logits[sure], exact[sure].amax(-1), atol=1e-4)
    if spread == 1.0:
        assert int(sure.sum()) > 32


@needs_fbgemm
def test_a_greedy_request_gets_the_full_heads_tokens(tmp_path: Path) -> None:
    """With the shortlist (greedy) and without it (asking for log-probabilities), also side by side."""
    folder = make_t5_checkpoint(tmp_path, vocab_size=MIN_VOCABULARY + 200)
    model = loaded(folder, "plain")
    prompts = random_prompts((9, 30), MIN_VOCABULARY)
    full, _ = greedy(model, prompts, 20)
    engine = engine_of(model)
    for number, prompt in enumerate(prompts):
        for name, logprobs in (("short", None), ("full", 0)):
            params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=logprobs)
            engine.add(f"{name}{number}", [prompt], params)
    results = drain(engine)
    for number, expected in enumerate(full):
        assert results.sequences[f"short{number}", 0].token_ids == expected
        assert results.sequences[f"full{number}", 0].token_ids == expected
