"""Small things that the training tests share: a tiny shape, a tokenizer made on the spot, a stream without files."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.collate import PackedBatch, collate
from finetune.config import ModelConfig, OptimizerConfig, PhaseConfig, TrainConfig
from finetune.example import TextExample, TokenExample
from finetune.model import T5, initialize
from finetune.packing import PackedRow
from finetune.tokenization import DEMO_TOKENIZER

SHAPE = ModelConfig(
    vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=2, d_kv=8
)  # unequal stacks, and an inner size that is not d_model
TRAINED_SHAPE = ModelConfig(
    vocab_size=8192, d_model=16, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, d_kv=8
)  # for the demo tokenizer
EXAMPLES = (
    TokenExample((5, 6, 7, 20, 9, 1), (8, 9, 77, 1), "a"),
    TokenExample((15, 6, 1), (8, 1), "b"),
    TokenExample((5, 60, 7, 20, 9, 11, 12, 1), (18, 9, 7, 44, 4, 1), "c"),
)


def make_model(config: ModelConfig = SHAPE, seed: int = 0) -> T5:
    model = T5(config)
    initialize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def one_row(*examples: TokenExample, input_length: int = 20, target_length: int = 14) -> PackedBatch:
    """The examples packed together in one row."""
    return collate([PackedRow(examples)], input_length, target_length)


def apart(*examples: TokenExample, input_length: int = 9, target_length: int = 7) -> PackedBatch:
    """Each example in a row of its own."""
    return collate([PackedRow((example,)) for example in examples], input_length, target_length)


class WordStream:
    """An endless stream of made-up copy tasks; the state is a count and a seed."""

    def __init__(self, mixture: str, seed: int) -> None:
        self.mixture, self.seed, self.num_draws = mixture, seed, 0
        self.counts: Counter[str] = Counter()

    def __next__(self) -> TextExample:
        rng = random.Random(f"{self.mixture}/{self.seed}/{self.num_draws}")
        self.num_draws += 1
        words = rng.choices(["heads", "tails", "garden", "yes", "no", "coin", "positive"], k=rng.randint(2, 9))
        self.counts["copy"] += 1
        return TextExample(f"Copy: {' '.join(words)}", " ".join(words[: rng.randint(1, 4)]), "copy", "zs_noopt")

    def state_dict(self) -> dict[str, Any]:
        return {"num_draws": self.num_draws, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_draws = state["num_draws"]
        self.counts = Counter(state["counts"])

    def manifest(self) -> list[dict[str, Any]]:
        return [{"task": "copy", "licence": "Apache-2.0", "weight": 1.0, "count": self.counts["copy"]}]


def word_source(mixture: str, data: tuple[str, ...], seed: int) -> WordStream:
    return WordStream(mixture, seed)


def train_config(output: Path, **changes: Any) -> TrainConfig:
    """Two short phases, with dropout, of a model that trains in a second."""
    phase: dict[str, Any] = {
        "learning_rate": 1e-2,
        "dropout": 0.1,
        "input_length": 24,
        "target_length": 12,
        "rows_per_batch": 4,
    }
    phases = (
        PhaseConfig("denoise", 4, "first", objective="denoise", micro_rows=2, **phase),
        PhaseConfig("instructions", 6, "second", schedule="linear", warmup_steps=2, **phase),
    )
    settings: dict[str, Any] = {
        "phases": phases,
        "model": TRAINED_SHAPE,
        "tokenizer": str(DEMO_TOKENIZER),
        "output": str(output),
        "optimizer": OptimizerConfig(),
        "log_steps": 1,
        "checkpoint_steps": 5,
        "threads": 1,
    }
    return TrainConfig(**(settings | changes))
