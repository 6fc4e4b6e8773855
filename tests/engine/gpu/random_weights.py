"""Flan-T5's shapes with random weights, made on the device: for benchmarks that need the sizes and no answers."""

from __future__ import annotations

import math
from typing import Literal

import torch

from serve.engine.config import ModelConfig
from serve.engine.weights import EMBEDDING, Checkpoint, expected_shapes

Size = Literal["small", "base", "large", "xl", "xxl"]

_FLAN_T5: dict[Size, dict[str, int]] = {
    "small": {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": 8},
    "base": {"d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 24},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24},
}


def flan_t5_config(size: Size) -> ModelConfig:
    """The dimensions of google/flan-t5-`size`: gated GELU, a head of its own, 32,128 rows of vocabulary."""
    dims = _FLAN_T5[size]
    return ModelConfig(
        d_model=dims["d_model"],
        d_kv=64,
        d_ff=dims["d_ff"],
        num_heads=dims["num_heads"],
        num_layers=dims["num_layers"],
        num_decoder_layers=dims["num_layers"],
        vocab_size=32128,
        activation="gelu_new",
        gated=True,
    )


def random_checkpoint(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, tied: bool = False, seed: int = 0
) -> Checkpoint:
    """A checkpoint of random tensors that never were on a disk, nor anywhere but on `device`.

    For Flan-T5-XL in bfloat16 that is 5.7 GB, and as much again while T5Model lays its matrices together:

        checkpoint = random_checkpoint(flan_t5_config("xl"), device=device, dtype=torch.bfloat16)
        model = T5Model(checkpoint, device=device, dtype=torch.bfloat16)
        del checkpoint

    The spreads keep scores small (T5 does not scale them) and numbers finite in any dtype, so a random model takes
    the time of a real one; what it says means nothing, and it may never say EOS.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(shape: tuple[int, ...], spread: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(spread)

    tensors = {
        name: draw(shape, 0.1).add_(1.0) if name.endswith("norm.weight") else draw(shape, _spread(name, config))
        for name, shape in expected_shapes(config).items()
    }
    # Small, and turned into tables on the host.
    tensors |= {name: bias.cpu() for name, bias in tensors.items() if name.endswith("relative_attention_bias.weight")}
    embedding = tensors[EMBEDDING]
    head = embedding if tied else draw((config.vocab_size, config.d_model), 2.4 / math.sqrt(config.d_model))
    return Checkpoint(config, tensors, head, tied=tied)


def _spread(name: str, config: ModelConfig) -> float:
    """Standard deviation of the values of tensor `name`."""
    if name.endswith("relative_attention_bias.weight"):
        return 1.5
    if name.endswith((".q.weight", ".k.weight")):
        return 0.02 * math.sqrt(512 / config.d_model)
    if name == EMBEDDING:
        return 1.0
    if name.endswith((".o.weight", ".wo.weight")):  # what a layer adds to its input
        return 0.5 / math.sqrt(config.inner if name.endswith(".o.weight") else config.d_ff)
    return 1.0 / math.sqrt(config.d_model)
