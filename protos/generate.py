"""Generate the Python modules of the wire contract: `python -m protos.generate`.

It writes, beside `flan/v1/generation.proto`, the message and service modules with their type stubs, and
`baseline.binpb`, the descriptor image that the next change is compared with. It refuses a contract that breaks the
one before it: a renumbered, retyped or removed field would be misread by every client that is already out there.

The generator's version is exact (pyproject): it stamps the least protobuf and grpcio that the modules run with.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
PROTO = "protos/flan/v1/generation.proto"  # from the repository's root, so that generated imports say `protos.flan.v1`
BASELINE = PROTOS / "baseline.binpb"


def generate(output: Path) -> list[Path]:
    """Write the generated modules under `output`; the repository's root puts them where they belong.

    Returns:
        The files written: `protos/flan/v1/generation_pb2{,_grpc}.py` and their stubs, sorted.

    Raises:
        RuntimeError: the compiler refused the contract.
    """
    arguments = [
        "protoc",
        f"--proto_path={PROTOS.parent}",
        f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
        *(f"--plugin={name}={tool(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        *(f"--{kind}_out={output}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        PROTO,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"{PROTO} does not compile")
    return sorted((output / PROTO).parent.glob("generation_pb2*"))


def breaking_changes(against: Path = BASELINE) -> str:
    """What in the contract breaks clients of `against`, a line each; empty when nothing does."""
    done = subprocess.run(
        [tool("buf"), "breaking", PROTOS, "--against", against], capture_output=True, text=True, check=False
    )
    return (done.stdout + done.stderr).strip()


def write_baseline(path: Path = BASELINE) -> None:
    subprocess.run([tool("buf"), "build", PROTOS, "--exclude-source-info", "-o", path], check=True)


def tool(name: str) -> str:
    """A program of this environment, also when its folder is not on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"{name} is not installed: pip install -e '.[dev]'")
    return found


def main() -> int:
    if BASELINE.exists() and (changes := breaking_changes()):
        print(f"refused, because it breaks the contract:\n{changes}", file=sys.stderr)
        return 1
    for path in generate(PROTOS.parent):
        print(path.relative_to(PROTOS.parent))
    write_baseline()
    return 0


if __name__ == "__main__":
    sys.exit(main())
