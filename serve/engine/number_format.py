"""What `--dtype` means to the engine: the dtype of activations and caches, and the form the weights are stored in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serve.engine.layers import WeightFormat
from serve.engine.native.library import Level, level
from serve.engine.packed_linear import fbgemm_available

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKED: dict[str, WeightFormat] = {"float16": "float16", "int16": "int16", "int8": "int8"}  # on a CPU: weights only


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """`name` is what `--dtype` calls it, `dtype` that of activations and caches; `weights`: see layers.make_linear."""

    name: str
    dtype: torch.dtype
    weights: WeightFormat = "plain"

    @classmethod
    def of(cls, name: str, device: str, *, packs: bool = True) -> NumberFormat:
        """The format called `name` on a device; `packs` False is for a model that cannot store weights packed.

        On a CPU with packed kernels, float16, int16 and int8 say how weights are stored, and activations stay in
        float32 between the layers: T5 overflows float16, which no CPU computes with quickly anyway. Elsewhere a name is
        a dtype for everything. int16 needs our own kernels and a processor with AVX-512 VNNI, which has them.

        `auto` is the fastest format that keeps float32's results up to the rounding of the stored weights: int16, which
        rounds no more than float16 does, float16 weights where there are kernels for them, else float32; on CUDA
        bfloat16. It is never int8, whose agreement with float32 depends on the checkpoint, and on a CPU never bfloat16,
        which rounds 8 times as coarsely as float16 and is many times slower wherever the processor has no instructions
        for it.

        Raises:
            ValueError: there is no such format on this device; the message lists those there are.
        """
        packed = packs and not device.startswith("cuda") and fbgemm_available()
        integers = packed and level() is Level.AVX512_VNNI
        known = [*_DTYPES, *(["int16"] if integers else []), *(["int8"] if packed else [])]
        if name == "auto":
            on_cpu = "int16" if integers else "float16" if packed else "float32"
            name = "bfloat16" if device.startswith("cuda") else on_cpu
        if name not in known:
            raise ValueError(f"--dtype {name} is not supported on {device} here; use {', '.join(known)}")
        if packed and name in _PACKED:
            return cls(name, torch.float32, _PACKED[name])
        return cls(name, _DTYPES[name])
