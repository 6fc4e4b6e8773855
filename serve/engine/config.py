"""What the engine needs to know before it starts: the model's dimensions and its own limits. Both frozen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import CheckpointError

SUPPORTED_MODEL_TYPES = ("t5", "mt5")
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Dimensions of a T5, named as in `config.json`.

    Whether the head is tied is no field here: it is read off the checkpoint (`weights.Checkpoint.tied`), because
    transformers 5 writes `tie_word_embeddings: true` for every T5. `scale_decoder_outputs` holds for a tied head
    only: an untied one is never scaled.
    """

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    vocab_size: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    activation: str = "relu"  # one of ACTIVATIONS
    gated: bool = False
    scale_decoder_outputs: bool = True
    decoder_start_token_id: int = 0
    eos_token_id: int = 1
    architecture: str = "T5ForConditionalGeneration"

    @property
    def inner(self) -> int:
        """Width of all heads together; T5's need not equal d_model."""
        return self.num_heads * self.d_kv

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` (and the start token from `generation_config.json` where only that has it).

        Raises:
            CheckpointError: a missing file or field, or a kind of model that this engine does not run.
        """
        raw = _read_json(folder / "config.json")
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type {model_type!r} is not served by this engine "
                f"(it serves {', '.join(SUPPORTED_MODEL_TYPES)})"
            )
        generation_path = folder / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        activation, gated = _activation(raw.get("feed_forward_proj", "relu"))
        num_layers = _integer(raw, "num_layers")
        decoder_layers = raw.get("num_decoder_layers")
        names = raw.get("architectures")
        return cls(
            d_model=_integer(raw, "d_model"),
            d_kv=_integer(raw, "d_kv"),
            d_ff=_integer(raw, "d_ff"),
            num_heads=_integer(raw, "num_heads"),
            num_layers=num_layers,
            num_decoder_layers=num_layers if decoder_layers is None else int(decoder_layers),
            vocab_size=_integer(raw, "vocab_size"),
            relative_attention_num_buckets=int(raw.get("relative_attention_num_buckets", 32)),
            relative_attention_max_distance=int(raw.get("relative_attention_max_distance", 128)),
            layer_norm_epsilon=float(raw.get("layer_norm_epsilon", 1e-6)),
            activation=activation,
            gated=gated,
            scale_decoder_outputs=raw.get("scale_decoder_outputs") is not False,
            decoder_start_token_id=_first_id("decoder_start_token_id", raw, generation, _first_id("pad_token_id", raw)),
            eos_token_id=_first_id("eos_token_id", raw, generation, 1),
            architecture=names[0] if isinstance(names, list) and names else "T5ForConditionalGeneration",
        )


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of the engine.

    `encode_tokens_per_step` bounds one encode batch, and one chunk of scoring, in tokens (a longer prompt goes
    alone). `cache_bytes` is the room of both pools together; `encoder_cache_bytes` is on top of it, for prompts that
    no sequence uses at the moment. `thread_worth_seconds` is what a decode step on all threads has to save, on a CPU,
    to be worth it: what else the last of the cores would do meanwhile.
    """

    max_running_sequences: int = 32
    encode_tokens_per_step: int = 2048
    cache_bytes: int = 1 << 30
    encoder_cache_bytes: int = 1 << 26
    thread_worth_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_running_sequences", "encode_tokens_per_step", "cache_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.encoder_cache_bytes < 0:
            raise ValueError(f"encoder_cache_bytes must be at least 0, not {self.encoder_cache_bytes}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _integer(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def _first_id(name: str, raw: dict[str, Any], generation: dict[str, Any] | None = None, default: int = 0) -> int:
    """The id as config.json or, failing that, generation_config.json says; a list's first."""
    for source in (raw, generation or {}):
        value = source.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return default


def _activation(feed_forward: str) -> tuple[str, bool]:
    """("gated-gelu") -> ("gelu_new", True): the gated form of T5 1.1 means GELU's tanh approximation."""
    if feed_forward == "gated-gelu":
        return "gelu_new", True
    prefix, _, rest = feed_forward.rpartition("-")
    if prefix not in ("", "gated") or rest not in ACTIVATIONS:
        raise CheckpointError(f"config.json: feed_forward_proj {feed_forward!r} is not known")
    return rest, prefix == "gated"
