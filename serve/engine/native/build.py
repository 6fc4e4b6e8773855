"""Compiles the kernels: `python -m serve.engine.native.build`, and, as a build hook, whenever the package is built.

Needs a C compiler (CC, else cc); where there is none the package is built without them. One library holds the code
for all instruction sets and looks at the processor when it is loaded, so it may be built on another machine. Its
name carries a digest of the sources: one that was built from others is not found.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("kernels.c", "avx2.c", "avx512.c", "avx512_vnni.c")
_HEADERS = ("types.h", "kernels.h", "lanes_avx2.h", "lanes_avx512.h")
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"),
    "-ffp-contract=off",  # or the same sum is rounded once here and twice there
)


def library_path() -> Path:
    """Where the library of these sources is, or would be."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in (*SOURCES, *_HEADERS):
        digest.update((FOLDER / name).read_bytes())
    return FOLDER / f"libflan-{digest.hexdigest()[:12]}.so"


def build() -> Path | None:
    """Compile what is not there yet; returns the library, None where this machine has no use or no compiler for it.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    path = library_path()
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if path.exists():
        return path
    if compiler is None or platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *_FLAGS, "-o", str(made), *(str(FOLDER / name) for name in SOURCES), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        for old in FOLDER.glob("libflan-*.so"):
            old.unlink()
        made.replace(path)  # whole or not at all: another process may be looking
    return path


def main() -> int:
    path = build()
    print(path if path is not None else "no kernels for this machine, or no C compiler: torch does their work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
