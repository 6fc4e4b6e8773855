"""Compiles every kernel in every form that a Flan-T5-XL takes for two generations of cards; prints how many."""

from __future__ import annotations

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from serve.engine.gpu import decode_kernels, ragged_kernel

INTEGERS = {"pages", "first", "stored", "blocks"}
FLOATS = {"table", "part_totals", "part_scales"}


def compile_kernel(kernel: Any, architecture: int, dtype: str, constants: dict[str, Any]) -> None:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.startswith("stride"):
            return "i32"
        return "*i32" if name in INTEGERS else "*fp32" if name in FLOATS else f"*{dtype}"

    names = kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, {name: kind(name) for name in names}, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": True})
    assert len(made.asm["cubin"]) > 1000
    assert made.metadata.shared <= 160 * 1024, "more shared memory than an A100 gives a program"


def main() -> None:
    count = 0
    shape = {"HEADS": 32, "WIDTH": 64, "PADDED": 64}
    for architecture, dtype in itertools.product((80, 90), ("bf16", "fp32")):
        for with_bias, splits in itertools.product((True, False), (1, 8)):
            constants = {**shape, "SELF": with_bias, "LAST": 128, "PAGE": 16, "TURN": 64, "SPLITS": splits}
            compile_kernel(decode_kernels._attend, architecture, dtype, constants)
            count += 1
        compile_kernel(decode_kernels._join, architecture, dtype, {**shape, "SPLITS": 8})
        for causal in (True, False):
            tile = 32 if dtype == "fp32" else 64
            constants = {"CAUSAL": causal, "WIDEN": False, "LAST": 128, "WIDTH": 64, "PADDED": 64, "TILE": tile}
            compile_kernel(ragged_kernel._attend, architecture, dtype, constants)
            count += 1
        count += 1
    print(count)


if __name__ == "__main__":
    main()
