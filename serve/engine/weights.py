"""Reading a T5 checkpoint, strictly: every tensor the model needs is there, has its shape, and nothing is left over.

The folder decides, not the flags in its config: an `lm_head.weight` that differs from the embedding makes the head
untied; none, or an equal one, makes it tied.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from serve.engine.config import ModelConfig
from serve.errors import CheckpointError

EMBEDDING = "shared.weight"
EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
# Written by the first T5 checkpoints on the hub; T5 has no bias in cross-attention, so it was never read.
IGNORED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
PICKLED_PATTERNS = ("pytorch_model*.bin",)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a T5 by their Hugging Face names, as stored (dtype, CPU); `head` is the embedding when tied."""

    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    head: torch.Tensor  # [vocab_size, d_model]
    tied: bool

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def load_checkpoint(folder: Path, *, trust_checkpoint: bool = False) -> Checkpoint:
    """Read and check a checkpoint folder.

    Raises:
        CheckpointError: naming the file or tensor that is missing, unexpected, misshapen or unreadable.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    config = ModelConfig.from_folder(folder)
    tensors = _read_tensors(folder, trust_checkpoint=trust_checkpoint)
    tensors.pop(IGNORED, None)
    _settle_embedding(tensors)
    head = tensors.pop(HEAD, None)
    _check(tensors, expected_shapes(config))
    embedding = tensors[EMBEDDING]
    if head is None:
        return Checkpoint(config, tensors, embedding, tied=True)
    _check({HEAD: head}, {HEAD: (config.vocab_size, config.d_model)})
    tied = torch.equal(head, embedding)
    return Checkpoint(config, tensors, embedding if tied else head, tied=tied)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model but the head, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.d_model)}
    for stack, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        shapes[f"{stack}.final_layer_norm.weight"] = (config.d_model,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (
            config.relative_attention_num_buckets,
            config.num_heads,
        )
        attentions = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        for block in range(layers):
            prefix = f"{stack}.block.{block}.layer"
            for index, attention in enumerate(attentions):
                shapes |= _attention_shapes(f"{prefix}.{index}.{attention}", config)
                shapes[f"{prefix}.{index}.layer_norm.weight"] = (config.d_model,)
            shapes |= _feed_forward_shapes(f"{prefix}.{len(attentions)}.DenseReluDense", config)
            shapes[f"{prefix}.{len(attentions)}.layer_norm.weight"] = (config.d_model,)
    return shapes


def _attention_shapes(prefix: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}.weight": (config.inner, config.d_model) for name in "qkv"}
    shapes[f"{prefix}.o.weight"] = (config.d_model, config.inner)
    return shapes


def _feed_forward_shapes(prefix: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    inputs = ("wi_0", "wi_1") if config.gated else ("wi",)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}.weight": (config.d_ff, config.d_model) for name in inputs}
    shapes[f"{prefix}.wo.weight"] = (config.d_model, config.d_ff)
    return shapes


def _settle_embedding(tensors: dict[str, torch.Tensor]) -> None:
    """Leave the one embedding under its one name, whichever of its aliases the checkpoint stores.

    A T5 has a single embedding for both stacks, so an alias may stand in for it. The head may not: a checkpoint with
    an `lm_head.weight` alone would read its head as an embedding and never reach EOS (transformers#48154).
    """
    found = {name: tensors.pop(name) for name in (EMBEDDING, *EMBEDDING_ALIASES) if name in tensors}
    if not found:
        raise CheckpointError(f"tensor {EMBEDDING} is missing, and so are its aliases {', '.join(EMBEDDING_ALIASES)}")
    first_name, first = next(iter(found.items()))
    for name, tensor in found.items():
        if not torch.equal(tensor, first):
            raise CheckpointError(f"tensor {name} differs from {first_name}; a T5 has one embedding for both stacks")
    tensors[EMBEDDING] = first


def _check(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    for problem, names in (
        ("missing", sorted(shapes.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - shapes.keys())),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"tensor {names[0]} is {problem}{more}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"tensor {name} has shape {tuple(tensors[name].shape)}, the config says {shape}")
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"tensor {name} holds {tensors[name].dtype}, not floating point numbers")


def _read_tensors(folder: Path, *, trust_checkpoint: bool) -> dict[str, torch.Tensor]:
    index_path, single_path = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index_path.exists():
        return _read_sharded(folder, index_path)
    if single_path.exists():
        return _read_safetensors(single_path)
    pickled = sorted(path for pattern in PICKLED_PATTERNS for path in folder.glob(pattern))
    if not pickled:
        raise CheckpointError(f"model.safetensors is missing in {folder}")
    if not trust_checkpoint:
        raise CheckpointError(
            f"{pickled[0].name} is a pickle, which can run code when it is read, and there is no model.safetensors; "
            "convert it, or pass --trust-checkpoint if you trust where it comes from"
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in pickled:
        # weights_only also under trust: nothing but tensors is wanted from the file.
        tensors |= torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _read_sharded(folder: Path, index_path: Path) -> dict[str, torch.Tensor]:
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{index_path.name} cannot be read: {error!r}") from error
    tensors: dict[str, torch.Tensor] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if path.parent != folder or not path.exists():
            raise CheckpointError(f"{file_name}, named by {index_path.name}, is missing in {folder}")
        tensors |= _read_safetensors(path)
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"tensor {missing[0]} is missing: {index_path.name} names it, its file lacks it")
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    if not os.access(path, os.R_OK):  # safetensors would say that there is no such file
        raise CheckpointError(f"{path} is not readable for uid {os.getuid()}: permission denied")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
