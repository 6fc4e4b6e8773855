"""Adafactor as T5X has it, and learning-rate schedules.

Why our own: Hugging Face's Adafactor factors every matrix, T5X only those whose two largest dimensions are both at
least 128, so small tensors (the bucket table of the relative bias) take other steps there. For a tensor x with
gradient g, at step t = 1, 2, ...:

    beta2 = 1 - t^-0.8
    v     = beta2 v + (1 - beta2) (g^2 + eps1)         factored: its row and column means only
    u     = g / sqrt(v)                                 then u / max(1, RMS(u) / clip)
    x     = x - rate * max(eps2, RMS(x)) * u            so the rate is relative to the size of x

Source: `t5x/adafactor.py` (decay_rate 0.8, step_offset 0, no momentum, no weight decay).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from finetune.config import OptimizerConfig, PhaseConfig

EPSILON_SQUARED_GRADIENT = 1e-30
EPSILON_PARAMETER_SCALE = 1e-3


class Adafactor:
    """T5X's Adafactor over named parameters. The rate is an argument of `step`: schedules live outside."""

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Fresh state, as at step 0."""
        self.num_steps = 0
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            dims = factored_dims(parameter.shape, self.config.min_factored_size)
            zeros = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
            if dims is None:
                self.state[f"v.{name}"] = zeros
            else:
                small, large = dims
                self.state[f"v_row.{name}"] = zeros.mean(large)
                self.state[f"v_col.{name}"] = zeros.mean(small)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the gradients; parameters without one stay as they are."""
        self.num_steps += 1
        beta2 = 1.0 - self.num_steps**-self.config.beta2_decay
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            update = self._update(name, parameter.grad.float(), beta2)
            scale = rate / torch.clamp(rms(update) / self.config.clip_rms, min=1.0)
            if self.config.scale_parameter:
                scale = scale * torch.clamp(rms(parameter), min=EPSILON_PARAMETER_SCALE)
            parameter.sub_(update.mul_(scale).to(parameter.dtype))

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def relative_rate(self) -> float:
        """The rate of `relative_step`: 1e-2, then 1 / sqrt(t)."""
        return min(1e-2, 1.0 / math.sqrt(self.num_steps + 1))

    def state_dict(self) -> dict[str, Tensor]:
        return {"num_steps": torch.tensor(self.num_steps), **self.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        _check_names(set(self.state) | {"num_steps"}, set(state))
        self.num_steps = int(state["num_steps"])
        for name, tensor in self.state.items():
            tensor.copy_(state[name])

    def _update(self, name: str, gradient: Tensor, beta2: float) -> Tensor:
        dims = factored_dims(gradient.shape, self.config.min_factored_size)
        if dims is None:
            squared = gradient.square().add_(EPSILON_SQUARED_GRADIENT)
            v = self.state[f"v.{name}"].mul_(beta2).add_(squared, alpha=1.0 - beta2)
            return gradient * v.rsqrt()
        small, large = dims
        v_row = self.state[f"v_row.{name}"].mul_(beta2).add_(_mean_square(gradient, large), alpha=1.0 - beta2)
        v_col = self.state[f"v_col.{name}"].mul_(beta2).add_(_mean_square(gradient, small), alpha=1.0 - beta2)
        reduced = small - 1 if small > large else small  # where `small` is once `large` is gone
        row_factor = (v_row / v_row.mean(reduced, keepdim=True)).rsqrt_()
        return (gradient * row_factor.unsqueeze(large)).mul_(v_col.rsqrt().unsqueeze(small))


class AdamW:
    """torch's AdamW behind the same few methods, with the rate given to each step and an optional gradient clip."""

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Fresh state, as at step 0."""
        first, second = self.config.betas
        self._inner = torch.optim.AdamW(
            list(self.parameters.values()), betas=(first, second), weight_decay=self.config.weight_decay
        )
        self.num_steps = 0

    def step(self, rate: float) -> None:
        self.num_steps += 1
        if self.config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        for group in self._inner.param_groups:
            group["lr"] = rate
        self._inner.step()

    def zero_grad(self) -> None:
        self._inner.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        flat = {"num_steps": torch.tensor(self.num_steps)}
        for index, name in enumerate(self.parameters):
            for key, tensor in self._inner.state_dict()["state"].get(index, {}).items():
                flat[f"{key}.{name}"] = tensor
        return flat

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_steps = int(state["num_steps"])
        nested: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.parameters):
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {key: state[f"{key}.{name}"] for key in keys if f"{key}.{name}" in state}
            if found:
                nested[index] = found
        self._inner.load_state_dict({"state": nested, "param_groups": self._inner.state_dict()["param_groups"]})


Optimizer = Adafactor | AdamW


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> Optimizer:
    kinds: dict[str, Any] = {"adafactor": Adafactor, "adamw": AdamW}
    built: Optimizer = kinds[config.name](model.named_parameters(), config)
    return built


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """The rate of the phase's step `step`, from 0.

    With learning_rate 1.0 over 100 steps: constant 1.0; inverse_sqrt with decay_start 25 gives 0.5 at step 100;
    linear 0.5 and cosine 0.5 at step 50 (final_learning_rate 0); warmup_steps 10 gives 0.1 at step 0.
    """
    peak = phase.learning_rate
    if peak is None:
        raise ValueError(f"phase {phase.name} has no learning_rate of its own (relative_step)")
    if step < phase.warmup_steps:
        return peak * (step + 1) / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    if phase.schedule == "inverse_sqrt":
        return peak * math.sqrt(phase.decay_start / max(step, phase.decay_start))
    if phase.schedule == "linear":
        return peak + (phase.final_learning_rate - peak) * done
    if phase.schedule == "cosine":
        return phase.final_learning_rate + (peak - phase.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def factored_dims(shape: torch.Size | tuple[int, ...], min_size: int) -> tuple[int, int] | None:
    """(second largest, largest) dimension of a tensor whose second moment is factored, else None.

    >>> factored_dims((512, 128), 128), factored_dims((32, 8), 128), factored_dims((512,), 128)
    ((1, 0), None, None)
    """
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda dim: shape[dim])
    if shape[order[-2]] < min_size:
        return None
    return order[-2], order[-1]


def rms(tensor: Tensor) -> Tensor:
    """Root mean square, in float32."""
    norm: Tensor = torch.linalg.vector_norm(tensor.float())
    return norm / math.sqrt(tensor.numel())


def _mean_square(gradient: Tensor, dim: int) -> Tensor:
    """Mean of g^2 + eps1 along a dimension, without a temporary of the gradient's size."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dim=dim)
    return norm.square_().div_(gradient.shape[dim]).add_(EPSILON_SQUARED_GRADIENT)


def _check_names(expected: set[str], found: set[str]) -> None:
    if expected != found:
        odd = sorted(expected ^ found)
        raise ValueError(f"the optimizer state is of another model or optimizer: {', '.join(odd[:4])} ...")
