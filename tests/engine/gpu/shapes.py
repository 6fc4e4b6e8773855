"""The tiny T5 of this folder's tests."""

from __future__ import annotations

from serve.engine.config import ModelConfig

TINY = ModelConfig(
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_heads=2,
    num_layers=2,
    num_decoder_layers=2,
    vocab_size=300,
    activation="gelu_new",
    gated=True,
)
