"""Adafactor against an independent numpy transcription of t5x/adafactor.py and against printed numbers; schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from finetune.config import OptimizerConfig, PhaseConfig
from finetune.optim import Adafactor, AdamW, build_optimizer, factored_dims, learning_rate
from tests.finetune.tiny import make_model

Array = npt.NDArray[np.float64]


def t5x_adafactor(x: Array, gradients: list[Array], rate: float) -> Array:
    """`apply_param_gradient` of T5X with its defaults, in numpy and float64, for a tensor of one or two dimensions."""
    factored = x.ndim == 2 and min(x.shape) >= 128
    v_row = v_col = v = None
    for count, g in enumerate(gradients):
        decay = 1.0 - (count + 1.0) ** -0.8
        squared = g * g + 1e-30
        if factored:
            d1, d0 = (int(d) for d in np.argsort(x.shape)[-2:])  # second largest, largest
            v_row = (0 if v_row is None else decay * v_row) + (1 - decay) * squared.mean(axis=d0)
            v_col = (0 if v_col is None else decay * v_col) + (1 - decay) * squared.mean(axis=d1)
            reduced = d1 - 1 if d1 > d0 else d1
            row_factor = (v_row / v_row.mean(axis=reduced, keepdims=True)) ** -0.5
            y = g * np.expand_dims(row_factor, d0) * np.expand_dims(v_col**-0.5, d1)
        else:
            v = (0 if v is None else decay * v) + (1 - decay) * squared
            y = g * v**-0.5
        y /= max(1.0, float(np.sqrt((y * y).mean())) / 1.0)
        x = x - rate * max(1e-3, float(np.sqrt((x * x).mean()))) * y
    return x


def ours(x: Array, gradients: list[Array], rate: float, **settings: Any) -> Array:
    parameter = torch.nn.Parameter(torch.tensor(x, dtype=torch.float32))
    optimizer = Adafactor([("x", parameter)], OptimizerConfig(**settings))
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step(rate)
    return parameter.detach().double().numpy()


@pytest.mark.parametrize("shape", [(130, 200), (200, 130), (160, 160), (32, 6), (127, 512), (300,)])
def test_equals_t5x(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 0.3
    gradients = [rng.normal(size=shape) * scale for scale in (1e-3, 1e-2, 5.0, 1e-6)]
    expected = t5x_adafactor(x, gradients, 5e-3)
    assert np.abs(expected - x).max() > 1e-3
    np.testing.assert_allclose(ours(x, gradients, 5e-3), expected, atol=2e-6)


def test_golden_numbers() -> None:
    """x = (1, -2, 0.5), two gradients, rate 0.1: worked by hand.

    Step 1: beta2 0, so u = sign(g) = (1, -1, 1), RMS 1; RMS(x) = sqrt(5.25 / 3) = 1.322876.
    x = (0.867712, -1.867712, 0.367712). Step 2: beta2 = 1 - 2^-0.8 = 0.425651;
    v = 0.425651 g1^2 + 0.574349 g2^2 = (2.72305, 1.85739, 4.256508); u = g2 / sqrt(v) = (1.211996, 0.733757, 0);
    RMS(u) = sqrt(2.007333 / 3) = 0.817992 < 1, no clip; RMS(x) = 1.207600 ... so x -= 0.12076 u.
    """
    x, gradients = np.array([1.0, -2.0, 0.5]), [np.array([1.0, -2.0, 3.0]), np.array([2.0, 1.0, 0.0])]
    first = ours(x, gradients[:1], 0.1)
    np.testing.assert_allclose(first, [0.867712, -1.867712, 0.367712], atol=1e-6)
    scale = 0.1 * np.sqrt((first**2).mean())
    beta2 = 1 - 2**-0.8
    v = beta2 * gradients[0] ** 2 + (1 - beta2) * gradients[1] ** 2
    np.testing.assert_allclose(ours(x, gradients, 0.1), first - scale * gradients[1] / np.sqrt(v), atol=1e-6)


def test_a_small_parameter_moves_by_eps2_and_a_large_gradient_is_clipped() -> None:
    moved = ours(np.zeros(4), [np.array([4.0, 0.0, 0.0, 0.0])], 0.5)
    np.testing.assert_allclose(moved, [-0.5e-3, 0, 0, 0], atol=1e-9)  # max(1e-3, RMS 0) * 0.5
    later = [np.full(4, 1e-3), np.full(4, 1e3)]  # the second is a million times what v knows: clipped to RMS 1
    assert np.abs(ours(np.ones(4), later, 0.01) - ours(np.ones(4), later[:1], 0.01)).max() <= 0.01 + 1e-6


def test_without_scale_parameter_the_rate_is_absolute() -> None:
    moved = ours(np.full(4, 7.0), [np.full(4, 2.0)], 0.25, scale_parameter=False)
    np.testing.assert_allclose(moved, np.full(4, 6.75), atol=1e-6)


def test_factoring_rule() -> None:
    assert factored_dims((128, 128), 128) == (0, 1)
    assert factored_dims((8192, 192), 128) == (1, 0)
    assert factored_dims((127, 4096), 128) is None
    assert factored_dims((32, 12), 128) is None
    assert factored_dims((512,), 128) is None


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_state_round_trips(name: Any) -> None:
    def steps(model: torch.nn.Module, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(1e-2)

    config = OptimizerConfig(name=name, weight_decay=0.01 if name == "adamw" else 0.0)
    straight = make_model()
    steps(straight, build_optimizer(straight, config), range(4))
    broken = make_model()
    first = build_optimizer(broken, config)
    steps(broken, first, range(2))
    second = build_optimizer(broken, config)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    steps(broken, second, range(2, 4))
    for one, other in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_of_another_model_is_refused() -> None:
    optimizer = Adafactor([("x", torch.nn.Parameter(torch.zeros(3)))], OptimizerConfig())
    with pytest.raises(ValueError, match=r"another model or optimizer: v\.x"):
        optimizer.load_state_dict({"num_steps": torch.tensor(1)})


def test_adamw_clips_the_global_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    AdamW([("x", parameter)], OptimizerConfig(name="adamw", max_grad_norm=5.0)).step(0.1)
    assert parameter.grad.norm().item() == pytest.approx(5.0, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 0.1),  # warming up: 1 of 10
        ("constant", 9, 1.0),
        ("constant", 99, 1.0),
        ("inverse_sqrt", 24, 1.0),
        ("inverse_sqrt", 100, 0.5),
        ("linear", 10, 1.0),
        ("linear", 60, 0.6),
        ("linear", 110, 0.2),
        ("cosine", 60, 0.6),
        ("cosine", 110, 0.2),
    ],
)
def test_schedules(schedule: Any, step: int, expected: float) -> None:
    final = 0.2 if schedule in ("linear", "cosine") else 0.0
    phase = PhaseConfig(
        "p", 110, "m", 1.0, schedule=schedule, warmup_steps=10, decay_start=25, final_learning_rate=final
    )
    assert learning_rate(phase, step) == pytest.approx(expected)
