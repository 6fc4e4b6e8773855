"""A checkpoint folder: found, looked over, and described before any weight is read.

A local folder never touches the network. A hub id is downloaded once (safetensors, configs and tokenizer only) into
the hub's own cache; `HF_HUB_OFFLINE=1` makes that a cache look-up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.errors import CheckpointError

DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_NAME = "flan-demo"
ENCODER_DECODER_MODEL_TYPES = ("t5", "mt5", "umt5")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "README.md"]
_SAMPLED_FIELDS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder's configuration says of its model.

    `generation_defaults` are sampling fields (SPEC names) that its generation_config.json really sets;
    `prompt_format_version` is None for a checkpoint that our finetuning did not write.
    """

    folder: Path
    name: str
    architecture: str
    model_type: str
    is_encoder_decoder: bool
    generation_defaults: Mapping[str, float | int] = field(default_factory=dict)
    prompt_format_version: int | None = None


def served_name(model: str | None) -> str:
    """The name that a model is served under when no other is given: the folder's name, or the hub id."""
    if model is None:
        return DEMO_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def find(model: str | None) -> Path:
    """The folder of `--model`; a hub id may take a while.

    Raises:
        CheckpointError: no such folder, or the hub does not have it.
    """
    if model is None:
        return DEMO_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or path.exists()
    if looks_local:
        raise CheckpointError(f"--model {model}: no such folder")
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"--model {model}: neither a folder here nor to be had from the hub ({type(error).__name__}); "
            "give the path of a checkpoint folder, or an id such as google/flan-t5-small"
        ) from error


def inspect(folder: Path, name: str) -> Checkpoint:
    """Read the folder's configuration files.

    Raises:
        CheckpointError: naming the missing or damaged file.
    """
    config = _read_json(folder / "config.json", required=True)
    model_type = str(config.get("model_type", ""))
    architectures = config.get("architectures") or []
    architecture = str(architectures[0]) if architectures else model_type
    if not (folder / "tokenizer.json").is_file() and not (folder / "spiece.model").is_file():
        raise CheckpointError(f"{folder}: has neither tokenizer.json nor spiece.model")
    flan = _read_json(folder / "flan.json", required=False)
    version = flan.get("prompt_format_version")
    return Checkpoint(
        folder=folder,
        name=name,
        architecture=architecture,
        model_type=model_type,
        is_encoder_decoder=bool(config.get("is_encoder_decoder", model_type in ENCODER_DECODER_MODEL_TYPES)),
        generation_defaults=_generation_defaults(_read_json(folder / "generation_config.json", required=False)),
        prompt_format_version=version if isinstance(version, int) else None,
    )


def _generation_defaults(config: Mapping[str, Any]) -> dict[str, float | int]:
    """Sampling fields that the file sets. Without `do_sample: true` its temperature, top_p and top_k are inert."""
    names = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens", "max_new_tokens": "max_tokens"}
    if config.get("do_sample") is True:
        names |= {name: name for name in _SAMPLED_FIELDS}
    defaults = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    if config.get("do_sample") is True:
        defaults.setdefault("temperature", 1.0)
    return defaults


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent}: {path.name} is missing")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content
