"""From a checkpoint folder to an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.engine.layers import WeightFormat
from serve.engine.model import T5Model
from serve.engine.native.library import level
from serve.engine.runner import ModelRunner, Runner
from serve.engine.weights import load_checkpoint

logger = logging.getLogger(__name__)


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: WeightFormat = "plain",
    vocab_limit: int | None = None,
    trust_checkpoint: bool = False,
) -> T5Model:
    """Read a checkpoint folder onto a device; see T5Model for `dtype` and `weights`.

    Raises:
        CheckpointError: naming the file or tensor at fault.
    """
    checkpoint = load_checkpoint(folder, trust_checkpoint=trust_checkpoint)
    model = T5Model(checkpoint, device=device, dtype=dtype, weights=weights, vocab_limit=vocab_limit)
    if device.type == "cpu":
        ours = model.native_decoder is not None
        logger.info("decode steps run through %s", f"our own kernels for {level().name}" if ours else "torch")
    return model


def make_runner(model: T5Model, settings: EngineSettings, *, paged: bool | None = None) -> Runner[Any]:
    """What carries out the engine's plans on the model's device.

    `paged` (default: on CUDA, where Triton is installed) chooses the path of `serve.engine.gpu`; on a CPU that runs
    through Triton's interpreter and is for tests only.
    """
    if paged is None:
        paged = model.device.type == "cuda"
    if paged:
        try:
            from serve.engine.gpu.runner import PagedRunner
        except ImportError as error:
            logger.warning(
                "no CUDA graphs and no kernels of our own, decoding will be slow: Triton is missing: %s", error
            )
        else:
            return PagedRunner(model, settings)
    return ModelRunner(model, cache_bytes=settings.cache_bytes, thread_worth_seconds=settings.thread_worth_seconds)


def make_engine(model: T5Model, settings: EngineSettings, runner: Runner[Any] | None = None) -> Engine:
    """An engine over `model`; `runner` (default: the device's) may be a wrapped one."""
    if runner is None:
        runner = make_runner(model, settings)
    config = model.config
    bytes_per_token = model.cache_row.bytes_per_token
    return Engine(
        runner,
        settings,
        vocab_size=config.vocab_size,
        eos_token_id=config.eos_token_id,
        self_bytes_per_token=bytes_per_token,
        cross_bytes_per_token=bytes_per_token,
    )
