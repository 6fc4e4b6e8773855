"""Tiny random decoder-only checkpoints of several families, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 384
EOS = 1

_DIMS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DIMS,
    "mistral": {**_DIMS, "sliding_window": 6},
    "qwen3": {**_DIMS, "head_dim": 32},
    "gemma3_text": {**_DIMS, "head_dim": 32, "sliding_window": 6, "num_hidden_layers": 6},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gemma2": {**_DIMS, "head_dim": 32, "sliding_window": 6},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2},
}


def make_causal_checkpoint(
    folder: Path, family: str = "llama", *, seed: int = 0, eos: int | list[int] = EOS, **config: Any
) -> Path:
    """Write a checkpoint without tokenizer files into `folder`; its weights are wide enough to say many things."""
    settings: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": eos, "pad_token_id": 0}
    settings["tie_word_embeddings"] = False  # a tied random model repeats its last token
    made = AutoConfig.for_model(family, **{**_FAMILIES[family], **settings, **config})
    torch.manual_seed(seed)
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                scale = 1.0 if "embed" in name or "wte" in name else 0.12
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    return folder
