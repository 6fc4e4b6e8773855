"""Random T5 checkpoints of any shape, written through safetensors as the real ones are.

The initial values keep a random model from being chaotic (T5 does not scale its scores, so q and k must be small) and
give it something to say (a broad relative bias, and a head of its own unless it is tied).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from serve.engine.config import ModelConfig
from serve.engine.weights import expected_shapes

Kind = Literal["t5", "t5_v1_1", "mt5"]

SMALL = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
FLAN_T5_SMALL = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8}

_KINDS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "relu"},
    "t5_v1_1": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "mt5": {
        "model_type": "mt5",
        "architectures": ["MT5ForConditionalGeneration"],
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}


def make_t5_checkpoint(
    folder: Path,
    kind: Kind = "t5_v1_1",
    *,
    vocab_size: int = 384,
    seed: int = 0,
    dims: dict[str, int] | None = None,
    shard_tensors: int | None = None,
    **config: Any,
) -> Path:
    """Write config.json, generation_config.json and model.safetensors into `folder`; no tokenizer files.

    Args:
        kind: "t5" has a tied, scaled head and ReLU; the others their own head and gated GELU.
        dims: over SMALL; for a real model's shapes pass FLAN_T5_SMALL and vocab_size=32128.
        shard_tensors: tensors a shard, for a sharded checkpoint with its index.
        config: further keys of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**SMALL, **(dims or {}), **_KINDS[kind], "vocab_size": vocab_size, "is_encoder_decoder": True}
    raw |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0, **config}
    raw |= {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
    (folder / "config.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    generation = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    write_tensors(folder, random_tensors(folder, seed=seed), shard_tensors=shard_tensors)
    return folder


def random_tensors(folder: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors that fit the folder's config.json; the untied kinds have their `lm_head.weight`."""
    config = ModelConfig.from_folder(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in sorted(expected_shapes(config).items()):
        values = torch.randn(shape, generator=generator)
        tensors[name] = 1.0 + 0.1 * values if name.endswith("norm.weight") else values * _std(name, config)
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings") is False:
        head = torch.randn(tensors["shared.weight"].shape, generator=generator) * 2.4 / math.sqrt(config.d_model)
        tensors["lm_head.weight"] = head
    return tensors


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], *, shard_tensors: int | None = None) -> None:
    """Write model.safetensors, or shards of `shard_tensors` tensors with their index."""
    if shard_tensors is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    parts = [names[i : i + shard_tensors] for i in range(0, len(names), shard_tensors)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _std(name: str, config: ModelConfig) -> float:
    """Spread of the values of tensor `name`."""
    if name.endswith("relative_attention_bias.weight"):
        return 1.5
    if name.endswith((".q.weight", ".k.weight")):
        return 0.02 * math.sqrt(512 / config.d_model)
    if name == "shared.weight":
        return 1.0
    if name.endswith((".o.weight", ".wo.weight")):  # what a layer adds to its input
        return 0.5 / math.sqrt(config.inner if name.endswith(".o.weight") else config.d_ff)
    return 1.0 / math.sqrt(config.d_model)
