"""The modes (dtypes) of our engine: which there are, and a model in one of them. The one place to add a new one."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loadtests.bench.shapes import SHAPES, config_of, random_tensors
from loadtests.bench.system import Place

if TYPE_CHECKING:
    import torch

    from serve.engine.layers import WeightFormat
    from serve.engine.model import T5Model
    from serve.engine.weights import Checkpoint

REFERENCE = "float32"  # what all others are compared with


@dataclass(frozen=True, slots=True)
class Mode:
    """How the engine is asked for a mode: the dtype of activations, and how weights are stored where it can choose."""

    dtype: str
    weights: WeightFormat = "plain"


_CPU = {
    "float32": Mode("float32"),
    "float16": Mode("float32", weights="float16"),
    "int16": Mode("float32", weights="int16"),
    "int8": Mode("float32", weights="int8"),
    "bfloat16": Mode("bfloat16"),
}
_CUDA = {"float32": Mode("float32"), "bfloat16": Mode("bfloat16"), "float16": Mode("float16")}
MODES = {"cpu": _CPU, "cuda": _CUDA}
_DEFAULT = {"cpu": ("float32", "float16", "int16", "int8"), "cuda": ("bfloat16",)}


def drawn(place: Place, dtype: torch.dtype) -> Checkpoint:
    """A random checkpoint of the place's shape whose tensors are made on its device and never on a disk."""
    from serve.engine.config import ModelConfig
    from serve.engine.weights import HEAD, Checkpoint

    shape = SHAPES[place.shape]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(shape)), encoding="utf-8")
        config = ModelConfig.from_folder(Path(folder))
    tensors = dict(random_tensors(shape, place.seed, device=place.device, dtype=dtype))
    # Small, and turned into tables before they go to the device.
    tensors |= {
        name: tensor.cpu() for name, tensor in tensors.items() if name.endswith("relative_attention_bias.weight")
    }
    head = tensors.pop(HEAD)
    return Checkpoint(config, tensors, head, tied=False)


def known(device: str) -> list[str]:
    """Every mode that there is a name for, the reference first; see `refusal` for which of them can be run."""
    return list(MODES[device])


def default(device: str) -> list[str]:
    """What is timed when nothing is asked for. Not bfloat16 on a CPU: few processors have its products."""
    return list(_DEFAULT[device])


def refusal(name: str, device: str) -> str | None:
    """Why this engine does not have a mode; None if it does.

    Raises:
        ValueError: nobody has it.
    """
    if name not in MODES[device]:
        raise ValueError(f"no mode {name!r} on {device}; there are {', '.join(known(device))}")
    from serve.engine.number_format import NumberFormat

    try:
        NumberFormat.of(name, device)
    except ValueError as error:
        return f"mode {name} is skipped: {error}"
    return None


def load(name: str, place: Place) -> T5Model:
    """A model in one of the modes.

    Raises:
        ValueError: there is no such mode here.
    """
    import torch

    from serve.engine.loading import load_model
    from serve.engine.model import T5Model

    if (problem := refusal(name, place.device)) is not None:
        raise ValueError(problem)
    mode = MODES[place.device][name]
    device, dtype, limit = torch.device(place.device), getattr(torch, mode.dtype), place.vocab_limit
    if place.folder is None:
        return T5Model(drawn(place, dtype), device=device, dtype=dtype, weights=mode.weights, vocab_limit=limit)
    return load_model(Path(place.folder), device=device, dtype=dtype, weights=mode.weights, vocab_limit=limit)
