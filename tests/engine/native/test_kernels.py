"""The kernels beside the same arithmetic in torch, for each instruction set that this processor has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.attention import RaggedAttention
from serve.engine.layers import RelativeBias, make_linear
from serve.engine.native import elementwise
from serve.engine.native.attention import NativeRaggedAttention
from serve.engine.native.head import NativeShortlistHead
from serve.engine.native.library import Kind, Level, level, limited
from serve.engine.native.linear import NativeLinear

LEVELS = [some for some in Level if Level.NONE < some <= level()]
pytestmark = pytest.mark.skipif(not LEVELS, reason="the kernels are not built, or not for this processor")
CPU = torch.device("cpu")
BOUNDS = {Kind.FLOAT32: 1e-6, Kind.FLOAT16: 1e-6, Kind.INT16: 4e-4, Kind.INT8: 0.05, Kind.INT8_FINE: 0.03}


@pytest.fixture(params=LEVELS, ids=lambda some: some.name, autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[Level]:
    with limited(request.param), torch.inference_mode():
        yield request.param


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def kinds(kernels: Level) -> list[Kind]:
    return [kind for kind in Kind if kind < Kind.INT16 or kernels is Level.AVX512_VNNI]


def error(result: Tensor, exact: Tensor) -> float:
    """Relative, Euclidean, of the worst row."""
    return float(((result.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 16), (200, 48), (384, 512), (1, 64)])
def test_products(kernels: Level, threads: int, outputs: int, inputs: int) -> None:
    """Near the exact product, as each kind promises, and of every row the same in every batch, bit for bit."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    for kind in kinds(kernels):
        if kind is Kind.INT16 and inputs % 32 != 0:
            continue
        linear = NativeLinear(weight, kind)
        stored = weight.half().double() if kind is Kind.FLOAT16 else weight.double()
        for rows in (1, 2, 3, 4, 5, 6, 7, 12, 13, 97, 200):
            x = torch.randn(rows, inputs)
            y = linear(x)
            assert y.shape == (rows, outputs)
            bound = BOUNDS[kind]
            if outputs > 1:
                assert error(y, x.double() @ stored.t()) < bound
            for row in (0, rows // 2, rows - 1):
                assert torch.equal(linear(x[row : row + 1])[0], y[row])


def test_int8_is_the_product_of_what_was_rounded(kernels: Level) -> None:
    """Integers as they come out of the documented rounding: the kernel itself loses nothing."""
    if kernels is not Level.AVX512_VNNI:
        pytest.skip("int8 layers are for VNNI")
    torch.manual_seed(1)
    weight, x = torch.randn(128, 64), torch.randn(9, 64)
    scales = weight.abs().amax(1) / 127
    numbers = (weight / scales[:, None]).round().double()
    largest = x.abs().amax(1, keepdim=True)
    levels = (x * (127 / largest)).double()
    rest = ((levels - levels.round()) * 254).round() / 254
    for kind, activations in ((Kind.INT8, levels.round()), (Kind.INT8_FINE, levels.round() + rest)):
        exact = activations @ numbers.t() * scales.double() * largest.double() / 127
        assert error(NativeLinear(weight, kind)(x), exact) < 1e-5


def test_int16_is_the_product_of_what_was_rounded(kernels: Level) -> None:
    """And never overflows: the largest numbers that there are, in every place, are summed exactly."""
    if kernels is not Level.AVX512_VNNI:
        pytest.skip("int16 layers are for VNNI")
    torch.manual_seed(2)
    weight, x = torch.randn(128, 608), torch.randn(9, 608) * torch.logspace(-1, 1, 608)
    weight[:64] = 1.0
    x[:3] = -1e4
    scales = weight.abs().amax(1).double() / 8191
    numbers = (weight / scales[:, None]).round()
    groups = x.double().view(9, -1, 32)
    steps = groups.abs().amax(2, keepdim=True) / 8191
    exact = ((groups / steps).round() * steps).view(9, -1) @ numbers.t() * scales
    y = NativeLinear(weight, Kind.INT16)(x)
    assert error(y, exact) < 1e-5
    assert torch.allclose(y[:3, :64], torch.tensor(-608e4), rtol=1e-6)


def test_int16_rounds_no_more_than_float16(kernels: Level, threads: int) -> None:
    """Over weights and activations like a model's, and such as T5's `wo` has: some a thousand times the others.

    A great activation that matters to nothing is the worst case: its neighbours' bits are all that is seen.
    """
    if kernels is not Level.AVX512_VNNI:
        pytest.skip("int16 layers are for VNNI")
    torch.manual_seed(3)
    weight, x = torch.randn(256, 1024) * 0.05, torch.randn(64, 1024)
    for great in ((), (7,), (7, 700, 701)):
        x[:50, great], weight[:, great] = 1e5, 0.0
        exact = x.double() @ weight.double().t()
        y = NativeLinear(weight, Kind.INT16)(x)
        assert error(y, exact) < error(NativeLinear(weight, Kind.FLOAT16)(x), exact)
        assert torch.equal(NativeLinear(weight, Kind.INT16)(x[1:2])[0], y[1])


def test_rows_that_are_zero_or_not_finite_stay_alone(kernels: Level) -> None:
    weight = torch.randn(64, 32)
    x = torch.randn(7, 32)
    x[1] = 0.0
    x[2, 5] = math.nan
    x[3, 31] = math.inf
    x[4] *= 1e-35
    for kind in kinds(kernels):
        linear = NativeLinear(weight, kind)
        y = linear(x)
        assert torch.equal(y[1], torch.zeros(64))
        assert not bool(y[2].isfinite().all())
        assert not bool(y[3].isfinite().all())
        assert bool(y[4].isfinite().all())
        for row in (0, 5, 6):
            assert torch.equal(y[row], linear(x[row : row + 1])[0])


def test_a_layer_that_the_kernels_do_not_take(kernels: Level) -> None:
    assert not NativeLinear.fits(torch.ones(8, 24), Kind.FLOAT32)  # 24 is no multiple of 16
    assert not NativeLinear.fits(torch.full((8, 16), 1e5), Kind.FLOAT16)
    assert NativeLinear.fits(torch.full((8, 16), 1e5), Kind.FLOAT32)
    assert NativeLinear.fits(torch.ones(8, 16), Kind.INT8) is (kernels is Level.AVX512_VNNI)
    assert NativeLinear.fits(torch.ones(8, 32), Kind.INT16) is (kernels is Level.AVX512_VNNI)
    assert not NativeLinear.fits(torch.ones(8, 48), Kind.INT16)


def test_int16_is_not_for_outputs_with_a_weight_that_dwarfs_the_others(kernels: Level) -> None:
    """It has one scale for all of them; such a layer, as one of an odd width, is float16 among the others."""
    torch.manual_seed(6)
    weight = torch.randn(64, 512)
    uneven = weight.clone()
    uneven[:, 3] = 100.0
    here = kernels is Level.AVX512_VNNI
    assert NativeLinear.fits(weight, Kind.INT16) is here
    assert not NativeLinear.fits(uneven, Kind.INT16)
    assert NativeLinear.fits(torch.zeros(64, 512), Kind.INT16) is here
    for some, kind in ((weight, Kind.INT16 if here else Kind.FLOAT16), (uneven, Kind.FLOAT16)):
        layer = make_linear(some, device=CPU, dtype=torch.float32, weights="int16", few_rows=True, native=True)
        assert isinstance(layer, NativeLinear)
        assert layer.kind is kind


@pytest.mark.parametrize("rows", [1, 5, 700])
def test_norm(threads: int, rows: int) -> None:
    x, weight = torch.randn(rows, 48) * 30, torch.randn(48)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    assert error(elementwise.normalize(x, weight, 1e-6), exact) < 1e-6
    x[0] = 0.0
    assert torch.equal(elementwise.normalize(x, weight, 1e-6)[0], torch.zeros(48))


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(threads: int, rows: int, gated: bool) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "silu": F.silu,
        "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    }
    x = torch.randn(rows, 64) * 6
    x[0, :4] = torch.tensor([-200.0, 200.0, -0.0, 1e-20])
    for name, function in functions.items():
        exact = function(x.double())
        if gated:
            exact = function(x[:, :32].double()) * x[:, 32:].double()
        ours = elementwise.activate(x, name, gated=gated)
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-6)
    x[0, 3] = math.nan
    for name in functions:
        assert bool(elementwise.activate(x, name, gated=False)[0, 3].isnan()) or name == "relu"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d_kv", [16, 64, 80, 128])
def test_attention_within_texts(threads: int, causal: bool, d_kv: int) -> None:
    """As torch's, with lengths around every edge: of a vector, of a block, of a piece and of a unit."""
    torch.manual_seed(2)
    heads, lengths = 3, (1, 15, 16, 17, 48, 49, 63, 64, 65, 130, 192, 193, 400)
    bias = RelativeBias(torch.randn(32, heads), max_distance=128, causal=causal, device=CPU, dtype=torch.float32)
    qkv = torch.randn(sum(lengths), 3, heads, d_kv) * d_kv**-0.25
    q, k, v = qkv.unbind(1)
    expected = RaggedAttention(lengths, bias, causal=causal, device=CPU)(q, k, v)
    ours = NativeRaggedAttention(lengths, bias.line(max(lengths)))(q, k, v)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)
    # A text's result does not depend on its neighbours, bit for bit.
    alone = NativeRaggedAttention((193,), bias.line(193))
    part = slice(sum(lengths[:11]), sum(lengths[:12]))
    assert torch.equal(alone(q[part], k[part], v[part]), ours[part])


def test_the_shortlist_has_the_best_token(kernels: Level, threads: int) -> None:
    """Always, and its exact logit; flat and broken rows are handed back."""
    if kernels is not Level.AVX512_VNNI:
        pytest.skip("the shortlist is an int8 product")
    torch.manual_seed(3)
    vocabulary, width, rows = 5000, 64, 40
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(vocabulary, width).to(dtype)
        head = NativeShortlistHead(weight)
        states = torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None]
        states[3] = 0.0
        states[4, 7] = math.nan
        exact = states.double() @ weight.double().t()
        found = head(states)
        assert found.crowded[3]  # all logits are 0, so all are candidates
        assert found.crowded[4]
        fine = ~found.crowded
        assert int(fine.sum()) >= rows - 4
        best = exact.argmax(1)
        assert torch.equal(found.token_ids[fine], best[fine])
        assert torch.allclose(found.logits[fine].double(), exact.amax(1)[fine], rtol=1e-4)
        alone = head(states[5:6].clone())
        assert (alone.token_ids[0], alone.logits[0]) == (found.token_ids[5], found.logits[5])


def test_near_equal_tokens_are_all_candidates(kernels: Level) -> None:
    """Two tokens that int8 cannot tell apart: float32 decides, whichever of them comes first; of equals the first."""
    if kernels is not Level.AVX512_VNNI:
        pytest.skip("the shortlist is an int8 product")
    torch.manual_seed(4)
    weight = torch.randn(4500, 32)
    state = torch.randn(1, 32)
    weight[[17, 4400]] = state[0] * 10
    for better, worse in ((17, 4400), (4400, 17)):
        weight[better] = state[0] * 10.001
        weight[worse] = state[0] * 10
        found = NativeShortlistHead(weight.clone())(state)
        assert not bool(found.crowded.any())
        assert int(found.token_ids[0]) == better
    weight[17] = weight[4400]
    assert int(NativeShortlistHead(weight)(state).token_ids[0]) == 17


def test_a_list_of_candidates_that_is_full_is_gone_through(kernels: Level, threads: int) -> None:
    """Logits that rise from token to token, so that each is a candidate until the next comes; and some too many."""
    if kernels is not Level.AVX512_VNNI:
        pytest.skip("the shortlist is an int8 product")
    torch.manual_seed(5)
    state = torch.randn(2, 64)
    weight = torch.randn(9000, 64) * 1e-3
    weight += state[0] * torch.linspace(-2.0, 1.0, 9000)[:, None]
    found = NativeShortlistHead(weight)(state)
    assert not bool(found.crowded[0])
    assert torch.equal(found.token_ids[:1], (state[:1].double() @ weight.double().t()).argmax(1))
    weight[8000:] = weight[8000]
    assert bool(NativeShortlistHead(weight)(state).crowded[0]), "a thousand are the best"
