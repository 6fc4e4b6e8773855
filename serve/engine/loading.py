"""From a checkpoint folder to an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.engine.layers import WeightFormat
from serve.engine.model import T5Model
from serve.engine.runner import ModelRunner, Runner
from serve.engine.weights import load_checkpoint


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
    return T5Model(checkpoint, device=device, dtype=dtype, weights=weights, vocab_limit=vocab_limit)


def make_engine(model: T5Model, settings: EngineSettings, runner: Runner | None = None) -> Engine:
    """An engine over `model`; `runner` (default: a plain ModelRunner) may be a wrapped one."""
    if runner is None:
        runner = ModelRunner(model, cache_bytes=settings.cache_bytes)
    config = model.config
    bytes_per_token = config.num_decoder_layers * 2 * config.inner * model.dtype.itemsize
    return Engine(
        runner,
        settings,
        vocab_size=config.vocab_size,
        eos_token_id=config.eos_token_id,
        self_bytes_per_token=bytes_per_token,
        cross_bytes_per_token=bytes_per_token,
    )
