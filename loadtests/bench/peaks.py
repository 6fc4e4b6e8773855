"""A processor's best rates of matrix products and memory: `python -m loadtests.bench.peaks THREADS` prints them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

_ROWS, _IN, _OUT = (128, 512), 512, 2048  # numbers of rows at which kernels do best, and a matrix that caches hold
_SECONDS = 0.7  # for each product
_READ_BYTES = 256 << 20  # more than any cache


def found(threads: int, environment: dict[str, str]) -> dict[str, float]:
    """The rates, measured in a process of its own with so many threads; see `measure`.

    Raises:
        RuntimeError: it failed, with what it said.
    """
    command = [sys.executable, "-m", "loadtests.bench.peaks", str(threads)]
    child = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise RuntimeError(f"the processor's rates could not be measured: {child.stderr.strip()[-500:]}")
    rates: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return rates


def measure(threads: int) -> dict[str, float]:
    """10^9 floating (or integer) operations a second of our own kernels in each mode, `memory` in 10^9 bytes read."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from serve.engine.int8_linear import int8_linear
    from serve.engine.native.library import Kind
    from serve.engine.native.linear import NativeLinear
    from serve.engine.packed_linear import Float16Linear, PackedLinear, fbgemm_available, onednn_available

    torch.set_num_threads(threads)
    weight = torch.randn(_OUT, _IN) * 0.05
    products: dict[str, list[Any]] = {"float32": [lambda x: F.linear(x, weight)]}
    if onednn_available():
        products["float32"].append(PackedLinear(weight))
    if fbgemm_available():
        products["float16"] = [Float16Linear(weight)]
        products["int8"] = [int8_linear(weight, few_rows=few) for few in (False, True)]
    for kind in (Kind.FLOAT32, Kind.FLOAT16, Kind.INT16, Kind.INT8):
        if NativeLinear.fits(weight, kind):
            products.setdefault(kind.name.lower(), []).append(NativeLinear(weight, kind))
    rates: dict[str, float] = {}
    with torch.inference_mode():
        numbers = torch.ones(_READ_BYTES // 4)
        memory = _least(numbers.sum)
        for mode, ways in products.items():
            for rows in _ROWS:
                x = torch.randn(rows, _IN)
                for way in ways:
                    rate = 2e-9 * rows * _IN * _OUT / _least(partial(way, x))
                    rates[mode] = max(rates.get(mode, 0.0), rate)
            memory = min(memory, _least(numbers.sum))  # again and again: other users of the machine slow it for seconds
        rates["memory"] = 1e-9 * numbers.nbytes / memory
    return rates


def _least(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of many calls."""
    call()
    least, ends = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < ends:
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return least


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
