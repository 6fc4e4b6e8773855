"""Checkpoint folders: what training writes, what `--model` and `--resume` read.

A run's output folder is itself the newest finished checkpoint; older ones, with what a resume needs, lie inside:

    output/
      config.json model.safetensors tokenizer.json ... README.md flan.json    the newest finished checkpoint
      train_log.jsonl
      training/step-00000500/     the same files (hard links) and, for --resume,
        optimizer.safetensors       optimizer state and random states
        trainer_state.json          step, phase, position in the data, leftovers of packing

A checkpoint is written to a temporary name, then renamed; only then are its files put in the output folder, each by an
atomic rename. So a crash at any moment leaves a folder that loads.

Readers. `config.json` says `tie_word_embeddings: false` beside an own `lm_head.weight` (T5 1.1, Flan-T5): every
version of transformers before 5, CTranslate2 and our engine take that as "apart, unscaled"; transformers 5 forces the
field to true but reads the false as "do not scale", finds `lm_head.weight` in the file, and keeps it apart. A tied
T5 1.0 has `tie_word_embeddings: true` and no `lm_head.weight`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config import ModelConfig
from finetune.model import T5
from finetune.tokenization import TOKENIZER_FILES

TRAINING_FOLDER = "training"
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"
_TEMPORARY = ".tmp"
_IGNORED_TENSORS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # copies of shared.weight
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CheckpointError(ValueError):
    """A folder that cannot be used; the message names the file and what is wrong with it."""


def read_model_config(folder: Path) -> ModelConfig:
    """The shape in a folder's config.json. An absent `tie_word_embeddings` means true, as in transformers."""
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "t5":
        raise CheckpointError(f"{folder}/config.json: model_type is {raw.get('model_type')!r}; only t5 can be trained")
    try:
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            d_model=raw["d_model"],
            d_ff=raw["d_ff"],
            num_layers=raw["num_layers"],
            num_decoder_layers=raw.get("num_decoder_layers") or raw["num_layers"],
            num_heads=raw["num_heads"],
            d_kv=raw["d_kv"],
            feed_forward_proj=raw.get("feed_forward_proj", "relu"),
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
            relative_attention_num_buckets=raw.get("relative_attention_num_buckets", 32),
            relative_attention_max_distance=raw.get("relative_attention_max_distance", 128),
            layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-6),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json: {error.args[0]} is missing") from error


def load_model(folder: Path) -> T5:
    """The model of a folder, in float32.

    Raises:
        CheckpointError: naming missing, unexpected or misshapen tensors; nothing is ever left at random.
    """
    config = read_model_config(folder)
    tensors = {name: tensor.float() for name, tensor in load_tensors(folder).items() if name not in _IGNORED_TENSORS}
    if "lm_head.weight" in tensors and config.tie_word_embeddings:
        if not torch.equal(tensors["lm_head.weight"], tensors["shared.weight"]):
            raise CheckpointError(
                f"{folder}: config.json says tie_word_embeddings true, but lm_head.weight differs from shared.weight; "
                "set tie_word_embeddings to false if this is a T5 1.1 or Flan-T5 (transformers 5 wrote it wrongly)"
            )
        del tensors["lm_head.weight"]
    with torch.device("meta"):
        model = T5(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    faults = [f"missing {name}" for name in sorted(set(wanted) - set(tensors))]
    faults += [f"unexpected {name}" for name in sorted(set(tensors) - set(wanted))]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, config.json says {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        raise CheckpointError(f"{folder}: {'; '.join(faults[:8])}{' ...' if len(faults) > 8 else ''}")
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(True)
    return model


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing (pickled weights are not read)")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder}/{name}: {error}") from error
    return tensors


def write_model(
    folder: Path,
    model: T5,
    *,
    tokenizer: Path,
    dropout: float,
    card: str,
    flan: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """All servable files of a checkpoint into an existing folder. `tokenizer` is a folder; its files are copied."""
    state = {name: tensor.detach().cpu().to(_DTYPES[dtype]).contiguous() for name, tensor in model.state_dict().items()}
    write_files(folder, state, config_json(model.config, dropout, dtype), tokenizer=tokenizer, card=card, flan=flan)


def write_files(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    tokenizer: Path,
    card: str,
    flan: Mapping[str, Any],
) -> None:
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    weights = folder / "model.safetensors"
    save_file(dict(state), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it 0600, which the server's own user in a container cannot read
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _GENERATION_CONFIG)
    write_json(folder / "flan.json", flan)
    (folder / "README.md").write_text(card, encoding="utf-8")


_GENERATION_CONFIG = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def config_json(config: ModelConfig, dropout: float, dtype: str) -> dict[str, Any]:
    """config.json of a T5ForConditionalGeneration. `torch_dtype` is what readers before transformers 5 look for."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **asdict(config),
        "dense_act_fn": "gelu_new" if config.feed_forward_proj == "gated-gelu" else "relu",
        "is_gated_act": config.feed_forward_proj == "gated-gelu",
        "dropout_rate": dropout,
        "initializer_factor": 1.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


class CheckpointStore:
    """The checkpoints of one run: `save` adds one and makes it the newest, `latest` finds it again."""

    def __init__(self, output: Path, keep: int) -> None:
        self.output, self.keep = output, keep
        self.training = output / TRAINING_FOLDER

    def finished(self) -> list[Path]:
        """Finished resumable checkpoints, oldest first."""
        found = self.training.glob("step-*") if self.training.is_dir() else ()
        return sorted(path for path in found if path.name.removeprefix("step-").isdigit())

    def latest(self) -> Path | None:
        finished = self.finished()
        return finished[-1] if finished else None

    def begin(self, step: int) -> Path:
        """An empty temporary folder to write a checkpoint in."""
        self.training.mkdir(parents=True, exist_ok=True)
        folder = self.training / f"step-{step:08d}{_TEMPORARY}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def commit(self, folder: Path) -> Path:
        """Rename a written temporary folder, publish it in the output folder, drop the oldest."""
        for path in folder.iterdir():
            _flush(path)
        final = folder.with_name(folder.name.removesuffix(_TEMPORARY))
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        _flush(self.training)
        self.publish(final)
        for old in self.finished()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def publish(self, checkpoint: Path) -> None:
        """Put a checkpoint's servable files into the output folder, the weights last: a first is whole or absent."""
        names = [path.name for path in checkpoint.iterdir() if path.name not in (OPTIMIZER_FILE, STATE_FILE)]
        for name in sorted(names, key=lambda name: (name == "model.safetensors", name)):
            temporary = self.output / f".{name}{_TEMPORARY}"
            temporary.unlink(missing_ok=True)
            try:
                os.link(checkpoint / name, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(checkpoint / name, temporary)
            temporary.replace(self.output / name)


def export(source: Path, target: Path, dtype: str) -> None:
    """A copy of a checkpoint's servable files with its weights in `dtype`; a temporary name first, then renamed.

    Raises:
        CheckpointError: the source cannot be read, or the target already holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: already there; export writes a new folder")
    model = load_model(source)
    raw = read_json(source / "config.json")
    flan = read_json(source / "flan.json") if (source / "flan.json").is_file() else {}
    card = (source / "README.md").read_text(encoding="utf-8") if (source / "README.md").is_file() else ""
    temporary = target.with_name(target.name + _TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    flan = {**flan, "dtype": dtype}
    dropout = float(raw.get("dropout_rate", 0.0))
    write_model(temporary, model, tokenizer=source, dropout=dropout, card=card, flan=flan, dtype=dtype)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", temporary / "generation_config.json")
    if target.is_dir():
        target.rmdir()
    temporary.rename(target)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Make sure that a file or folder has reached the disk before anything is renamed onto it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
