"""Runtimes by name, imported only when chosen (so that serving T5 never imports vLLM)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from serve.errors import CheckpointError

RUNTIMES: dict[str, str] = {
    "torch": "serve.runtimes.torch_runtime:TorchRuntime",
}
TORCH_MODEL_TYPES = ("t5", "mt5")


def choose(asked: str, model_type: str) -> str:
    """The runtime for a model: the one asked for, or with "auto" the one that runs its architecture.

    Raises:
        CheckpointError: no runtime of this installation runs it.
    """
    name = "torch" if asked == "auto" else asked
    if name not in RUNTIMES:
        raise CheckpointError(f"--runtime {name}: not part of this version; it has {', '.join(RUNTIMES)}")
    if model_type not in TORCH_MODEL_TYPES:
        raise CheckpointError(
            f"model type {model_type!r} is not served by this version; it serves {', '.join(TORCH_MODEL_TYPES)}"
        )
    return name


def load_class(name: str) -> Any:
    """The class of a runtime, imported now."""
    module, _, attribute = RUNTIMES[name].partition(":")
    return getattr(import_module(module), attribute)
