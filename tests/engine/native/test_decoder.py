"""The decode step in C is the one in torch: same states, same keys and values, whatever the batch and the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serve.engine.layers import WeightFormat
from serve.engine.loading import load_model
from serve.engine.model import T5Model
from serve.engine.native.library import Level, level, limited
from serve.engine.row_tensors import RowTensors
from serve.sampling_params import SamplingParams
from tests.engine.checkpoints import FLAN_T5_SMALL, make_t5_checkpoint
from tests.engine.driving import drain, engine_of
from tests.engine.test_crowd import check_against_alone, make_guests, play
from tests.engine.test_model import Recording, greedy, random_prompts

LEVELS = [some for some in Level if Level.NONE < some <= level()]
pytestmark = pytest.mark.skipif(not LEVELS, reason="the kernels are not built, or not for this processor")
CPU = torch.device("cpu")


@pytest.fixture(params=LEVELS, ids=lambda some: some.name)
def kernels(request: pytest.FixtureRequest) -> Iterator[Level]:
    with limited(request.param):
        yield request.param


def both(folder: Path, weights: WeightFormat = "plain") -> tuple[T5Model, T5Model]:
    """The model with the kernels, and without."""
    native = load_model(folder, device=CPU, dtype=torch.float32, weights=weights)
    with limited(Level.NONE):
        plain = load_model(folder, device=CPU, dtype=torch.float32, weights=weights)
    assert native.native_decoder is not None
    assert plain.native_decoder is None
    return native, plain


@pytest.mark.parametrize("kind", ["t5", "t5_v1_1", "mt5"])
def test_states_are_those_of_torch(kernels: Level, kind: str, tmp_path: Path) -> None:
    """150 steps, beyond the bias's largest distance and over several capacities, of prompts around every edge."""
    native, plain = both(make_t5_checkpoint(tmp_path, kind))  # type: ignore[arg-type]
    prompts = random_prompts((1, 15, 16, 17, 33, 130), 380)
    ours, theirs = greedy(native, prompts, 150), greedy(plain, prompts, 150)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-3)
    assert ours[0] == theirs[0]


@pytest.mark.parametrize("dims", [{"d_kv": 64, "num_heads": 3}, {"d_kv": 128, "num_heads": 1}, {"d_kv": 32}])
@pytest.mark.parametrize("weights", ["plain", "float16"])
def test_other_shapes(kernels: Level, dims: dict[str, int], weights: WeightFormat, tmp_path: Path) -> None:
    native, plain = both(make_t5_checkpoint(tmp_path, dims=dims), weights)
    prompts = random_prompts((5, 70), 380)
    for mine, other in zip(greedy(native, prompts, 20)[1], greedy(plain, prompts, 20)[1], strict=True):
        tolerance = 1e-3 if weights == "plain" else 3e-2  # the kernels store keys and values in float16, too
        assert torch.allclose(mine, other, rtol=0, atol=tolerance)


def test_flan_t5_small_over_all_formats(tmp_path: Path) -> None:
    """Next to what torch makes of the same stored weights; int8 rounds activations as it does."""
    folder = make_t5_checkpoint(tmp_path, dims=FLAN_T5_SMALL)
    prompts = random_prompts((20, 90), 380)
    formats: list[tuple[WeightFormat, float]] = [("plain", 1e-3), ("float16", 3e-2)]
    if level() is Level.AVX512_VNNI:
        formats += [("int16", 3e-2), ("int8", 0.5)]
    for weights, tolerance in formats:
        native, plain = both(folder, weights)
        for mine, other in zip(greedy(native, prompts, 3)[1], greedy(plain, prompts, 3)[1], strict=True):
            assert torch.allclose(mine, other, rtol=0, atol=tolerance), weights


@pytest.mark.parametrize("weights", ["plain", "float16", "int16", "int8"])
def test_alone_equals_in_a_crowd_bit_for_bit(weights: WeightFormat, small_folder: Path) -> None:
    """Logits, not only tokens: a row's arithmetic does not know its batch."""
    if weights.startswith("int") and level() is not Level.AVX512_VNNI:
        pytest.skip("integer kernels are for VNNI")
    model = load_model(small_folder, device=CPU, dtype=torch.float32, weights=weights, vocab_limit=380)
    prompts = random_prompts((3, 18, 40, 7, 64, 100, 11), 380)
    crowd = greedy(model, prompts, 40)
    for number, prompt in enumerate(prompts):
        ids, logits = greedy(model, [prompt], 40)
        assert ids[0] == crowd[0][number]
        assert torch.equal(logits[0], crowd[1][number])


def test_threads_change_no_bit(small_folder: Path) -> None:
    model = load_model(small_folder, device=CPU, dtype=torch.float32, vocab_limit=380)
    prompts = random_prompts((3, 18, 40, 200), 380)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(greedy(model, prompts, 12)[1])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_a_crowd_that_comes_and_goes(kernels: Level, small_folder: Path) -> None:
    model = load_model(small_folder, device=CPU, dtype=torch.float32, vocab_limit=380)
    guests = make_guests(40, seed=5, max_prompt=300, max_tokens=50)
    results, _, _ = play(model, guests, max_running_sequences=16, encode_tokens_per_step=256)
    assert check_against_alone(model, guests, results) <= 2


def test_a_broken_prompt_harms_nobody_else(small_folder: Path) -> None:
    """Keys and values of NaN in the row next door, and in what a row held before, reach nobody."""
    model = load_model(small_folder, device=CPU, dtype=torch.float32, vocab_limit=380)
    good, bad, other = random_prompts((20, 20, 20), 380)
    alone = greedy(model, [good], 30)[1][0]
    runner = Recording(model)
    engine = engine_of(model, runner)
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=0)
    engine.add("bad", [bad], params)
    engine.add("good", [good], params)
    engine.step()
    with torch.inference_mode():
        for rows in (runner.cache.self_rows, runner.cache.cross_rows):
            assert isinstance(rows, RowTensors)
            assert rows.addresses
            for capacity in rows.addresses:
                rows.row(capacity, 0)[:] = float("nan")
    results = drain(engine)
    assert results.sequences["bad", 0].error is not None
    assert torch.equal(torch.stack(runner.logits["good"]), alone)
    engine.add("other", [other], params)
    drain(engine)
    assert torch.equal(torch.stack(runner.logits["other"]), greedy(model, [other], 30)[1][0])


def test_keys_beyond_float16_are_its_largest(small_folder: Path) -> None:
    """A half cache narrows, and does not make infinities of finite numbers."""
    model = load_model(small_folder, device=CPU, dtype=torch.float32, weights="float16", vocab_limit=380)
    assert model.cache_row.dtype is torch.float16
    (prompt,) = random_prompts((12,), 380)
    runner = Recording(model)
    runner._model.cross_keys_values = lambda states: iter(  # type: ignore[method-assign]
        [torch.full((len(states), 2, 4, 16), 1e6)] * 2
    )
    engine = engine_of(model, runner)
    engine.add("r", [prompt], SamplingParams(max_tokens=3, ignore_eos=True))
    result = drain(engine).sequences["r", 0]
    assert result.error is None
    assert len(result.token_ids) == 3


def test_what_the_kernels_do_not_take_goes_through_torch(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, dims={"d_kv": 24})
    model = load_model(folder, device=CPU, dtype=torch.float32)
    assert model.native_decoder is None
    assert model.cache_row.dtype is torch.float32
    (prompt,) = random_prompts((12,), 380)
    assert len(greedy(model, [prompt], 4)[0][0]) == 4
