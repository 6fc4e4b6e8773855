"""Runtimes by name, imported only when chosen (so that serving T5 never imports vLLM)."""

from __future__ import annotations

RUNTIMES: dict[str, str] = {
    "torch": "serve.runtimes.torch_runtime:TorchRuntime",
}
