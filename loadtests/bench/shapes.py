"""Random checkpoints of known shapes: T5 1.1 (gated GELU, a head of its own), with a tokenizer that only counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
FIRST_WORD_ID = 3  # prompts are drawn from here on


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a T5 1.1, named as in config.json."""

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    vocab_size: int = 32128


SHAPES = {
    "tiny": Shape(64, 16, 128, 4, 2, 2, 384),  # to try the command itself
    "flan-t5-small": Shape(512, 64, 1024, 6, 8, 8),
    "flan-t5-base": Shape(768, 64, 2048, 12, 12, 12),
    "flan-t5-large": Shape(1024, 64, 2816, 16, 24, 24),
    "flan-t5-xl": Shape(2048, 64, 5120, 32, 24, 24),
}


def write_checkpoint(folder: Path, shape: Shape, seed: int) -> Path:
    """Write config.json, model.safetensors and a tokenizer into `folder`; the same bytes for the same seed."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1), encoding="utf-8")
    generation = {"decoder_start_token_id": PAD_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    save_file(dict(random_tensors(shape, seed)), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, shape.vocab_size)
    return folder


def config_of(shape: Shape) -> dict[str, object]:
    """config.json. Both flags say that the head is apart and not scaled, which transformers 5 reads off the second."""
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "decoder_start_token_id": PAD_ID,
        "dropout_rate": 0.0,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        **asdict(shape),
    }


def random_tensors(
    shape: Shape, seed: int, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the whole model, head included, in the order of their names; `dtype` None is float32.

    The spreads keep a random model from being chaotic: T5 does not scale its scores, so q and k must be small. The
    head's row of EOS is zero, so that EOS is never the best token and all lengths are those that were asked for.
    """
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    for name, size in sorted(tensor_sizes(shape).items()):
        values = torch.randn(size, generator=generator, device=device)
        values = 1.0 + 0.1 * values if name.endswith("norm.weight") else values * _spread(name, shape)
        if name == "lm_head.weight":
            values[EOS_ID] = 0.0
        yield name, values if dtype is None else values.to(dtype)


def tensor_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model with its size."""
    inner = shape.num_heads * shape.d_kv
    embedding = (shape.vocab_size, shape.d_model)
    sizes: dict[str, tuple[int, ...]] = {"shared.weight": embedding, "lm_head.weight": embedding}
    for stack, layers in (("encoder", shape.num_layers), ("decoder", shape.num_decoder_layers)):
        sizes[f"{stack}.final_layer_norm.weight"] = (shape.d_model,)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        sizes[bias] = (32, shape.num_heads)
        attentions = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        for block in range(layers):
            layer = f"{stack}.block.{block}.layer"
            for place, attention in enumerate(attentions):
                sizes |= {f"{layer}.{place}.{attention}.{part}.weight": (inner, shape.d_model) for part in "qkv"}
                sizes[f"{layer}.{place}.{attention}.o.weight"] = (shape.d_model, inner)
                sizes[f"{layer}.{place}.layer_norm.weight"] = (shape.d_model,)
            last = f"{layer}.{len(attentions)}"
            sizes |= {f"{last}.DenseReluDense.{name}.weight": (shape.d_ff, shape.d_model) for name in ("wi_0", "wi_1")}
            sizes[f"{last}.DenseReluDense.wo.weight"] = (shape.d_model, shape.d_ff)
            sizes[f"{last}.layer_norm.weight"] = (shape.d_model,)
    return sizes


def word(token_id: int) -> str:
    """The tokenizer's name of an id, for peers that take tokens as text."""
    return {PAD_ID: "<pad>", EOS_ID: "</s>", UNKNOWN_ID: "<unk>"}.get(token_id, f"t{token_id}")


def _write_tokenizer(folder: Path, size: int) -> None:
    """A word-level tokenizer with one word an id: CTranslate2 reads its vocabulary from one."""
    vocabulary = {word(token_id): token_id for token_id in range(size)}
    special = [
        {"id": token_id, "content": word(token_id), "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token_id in (PAD_ID, EOS_ID, UNKNOWN_ID)
    ]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer = {"version": "1.0", **empty, "added_tokens": special, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": model}), encoding="utf-8")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _spread(name: str, shape: Shape) -> float:
    """Standard deviation of the values of tensor `name`."""
    if name.endswith("relative_attention_bias.weight"):
        return 1.5
    if name.endswith((".q.weight", ".k.weight")):
        return 0.02 * math.sqrt(512 / shape.d_model)
    if name == "shared.weight":
        return 1.0
    if name == "lm_head.weight":
        return 2.4 / math.sqrt(shape.d_model)
    if name.endswith(".o.weight"):  # what a layer adds to its input
        return 0.5 / math.sqrt(shape.num_heads * shape.d_kv)
    return (0.5 if name.endswith(".wo.weight") else 1.0) / math.sqrt(shape.d_ff if ".wo." in name else shape.d_model)
