"""A decoder-only model of transformers on one device, run on packed tokens with our own attention and cache.

Models differ in what their attention does (scaling, windows, caps, biases). Instead of a list of architectures that
are known to work, every model is compared with transformers' own forward pass before it serves: what this runtime
would compute wrongly stops the start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from serve.errors import CheckpointError
from serve.runtimes.causal_attention import (
    IMPLEMENTATION,
    ForcedAttention,
    PrefillAttention,
    StepAttention,
    attend,
    using,
)

_PROBE_TOKENS = 12  # of the comparison with transformers' own forward pass
_PROBE_PREFIX = 5  # so many of them are its prompt
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}  # relative to the logits' size
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")  # its angles depend on the longest text of the batch


@dataclass(frozen=True, slots=True)
class CausalDims:
    """What the cache and the engine need to know of a model."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    architecture: str


class CausalModel:
    """Weights on their device; holds no state of any request."""

    def __init__(self, model: Any, dims: CausalDims, vocab_limit: int | None) -> None:
        self.dims = dims
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.vocab_limit = dims.vocab_size if vocab_limit is None else min(vocab_limit, dims.vocab_size)
        self._model = model
        self._body = model.base_model
        self._head = model.get_output_embeddings()
        config = model.config.get_text_config()
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = float(getattr(config, "logit_scale", 1.0) or 1.0) / float(
            getattr(config, "logits_scaling", 1.0) or 1.0
        )

    def states(self, token_ids: Tensor, positions: Tensor, attention: StepAttention) -> Tensor:
        """Last hidden states [T, width] of packed tokens [T] at their positions [T]."""
        with using(attention):
            output = self._body(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)
        states: Tensor = output.last_hidden_state[0]
        return states

    def logits(self, states: Tensor) -> Tensor:
        """[T, width] -> float32 [T, vocab_limit]."""
        logits: Tensor = self._head(states).float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits[:, : self.vocab_limit]

    @torch.inference_mode()
    def check(self) -> None:
        """Compare with transformers' own forward pass.

        Raises:
            CheckpointError: this runtime does not compute what the model means.
        """
        ids = torch.arange(3, 3 + _PROBE_TOKENS, device=self.device) % self.dims.vocab_size
        try:
            ours = self._probe(ids)
            self._model.set_attn_implementation("eager")
            theirs = self._model(input_ids=ids[None], use_cache=False).logits[0, _PROBE_PREFIX:, : self.vocab_limit]
            self._model.set_attn_implementation(IMPLEMENTATION)
        except Exception as error:
            raise self._unsupported(f"{type(error).__name__}: {error}") from error
        difference = ((ours - theirs.float()).norm() / theirs.float().norm()).item()
        if not difference <= _TOLERANCES[self.dtype]:
            raise self._unsupported(f"its logits would be {difference:.1%} off")

    def _probe(self, ids: Tensor) -> Tensor:
        """Logits of the tokens from number `_PROBE_PREFIX` on, after a prefill of those before."""
        dims = self.dims
        row = torch.zeros(
            (dims.layers, 2, dims.kv_heads, _PROBE_PREFIX, dims.head_dim), device=self.device, dtype=self.dtype
        )
        positions = torch.arange(len(ids), device=self.device)
        self.states(ids[:_PROBE_PREFIX], positions[:_PROBE_PREFIX], PrefillAttention([row]))
        rest = ForcedAttention(row, [len(ids) - _PROBE_PREFIX])
        return self.logits(self.states(ids[_PROBE_PREFIX:], positions[_PROBE_PREFIX:], rest))

    def _unsupported(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.dims.architecture} is not supported by the transformers runtime ({why}); use --runtime vllm"
        )


def load_causal_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vocab_limit: int | None = None,
    trust_checkpoint: bool = False,
) -> CausalModel:
    """Read a checkpoint folder onto a device and check that it is computed as transformers does.

    Raises:
        CheckpointError: naming the file or tensor at fault, or the architecture.
    """
    _check_files(folder, trust_checkpoint)
    transformers.AttentionInterface.register(IMPLEMENTATION, attend)
    transformers.logging.disable_progress_bar()  # a server's log is no terminal
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            local_files_only=True,
            trust_remote_code=trust_checkpoint,
            use_safetensors=None if trust_checkpoint else True,
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise CheckpointError(f"{folder}: {kind.replace('_keys', '')} tensors: {_names(info[kind])}")
    dims = _dims(model)
    loaded = CausalModel(model.to(device).eval(), dims, vocab_limit)
    loaded.check()
    return loaded


def _check_files(folder: Path, trust_checkpoint: bool) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"config.json is missing in {folder}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if "auto_map" in raw and not trust_checkpoint:
        raise CheckpointError(f"{path}: wants its own code (auto_map), which runs only with --trust-checkpoint")
    if not trust_checkpoint and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: has no *.safetensors (pickled weights need --trust-checkpoint)")


def _dims(model: Any) -> CausalDims:
    """
    Raises:
        CheckpointError: a kind of model whose state is not keys and values alone, or depends on the batch.
    """
    config = model.config.get_text_config()
    architecture = type(model).__name__
    heads: int | None = getattr(config, "num_attention_heads", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or heads is None or getattr(model, "_is_stateful", False):
        raise CheckpointError(
            f"{architecture} keeps more than keys and values ({', '.join(sorted(kinds)) or 'a state'}), which the "
            "transformers runtime does not serve; use --runtime vllm"
        )
    rope = _rope_types(getattr(config, "rope_parameters", None))
    if any(kind in _BATCH_DEPENDENT_ROPE for kind in rope):
        raise CheckpointError(
            f"config.json: rope type {', '.join(sorted(rope))} makes a text's result depend on its batch in "
            "transformers; use --runtime vllm"
        )
    kv_heads = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None)
    limit = getattr(config, "max_position_embeddings", None)
    return CausalDims(
        layers=config.num_hidden_layers,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=config.hidden_size // heads if head_dim is None else head_dim,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        context_length=(1 << 30) if limit is None else int(limit),
        eos_token_ids=_eos_token_ids(model),
        architecture=architecture,
    )


def _rope_types(parameters: dict[str, Any] | None) -> set[str]:
    """The kinds of rotary embedding in a config: one, or one a kind of layer."""
    if not parameters:
        return set()
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    nested: Iterable[Any] = parameters.values()
    return {str(entry["rope_type"]) for entry in nested if isinstance(entry, dict) and "rope_type" in entry}


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    """As the generation config says, else the config; a chat model often has several."""
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if isinstance(ids, int):
            return (ids,)
        if ids:
            return tuple(int(token_id) for token_id in ids)
    return ()


def _names(entries: Iterable[Any]) -> str:
    """A few of the tensors' names; an entry is a name, or a name and shapes."""
    names = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in entries)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
