"""The Triton kernels and the engine over them, in processes of their own: Triton reads its mode when it is imported.

Through the interpreter and the compiler they run wherever Triton is installed (`pytest -m triton`); the same cases run
compiled, and with CUDA graphs, where a card is (`pytest -m gpu`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
CASES = ("kernel_cases", "engine_cases")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no usable CUDA device")


def run(*command: str, folder: Path, interpret: bool) -> str:
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    child = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == 0, (child.stdout + child.stderr)[-6000:]
    return child.stdout


def run_cases(name: str, folder: Path, *, interpret: bool) -> None:
    """All cases of a file; one that is skipped is a failure here."""
    options = ("-q", "-p", "no:cacheprovider", "-o", "timeout=0")
    out = run("-m", "pytest", *options, str(HERE / f"{name}.py"), folder=folder, interpret=interpret)
    summary = out.strip().splitlines()[-1]
    assert " passed" in summary, summary
    assert "skipped" not in summary, summary


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_through_the_interpreter(name: str, tmp_path: Path) -> None:
    run_cases(name, tmp_path, interpret=True)


@pytest.mark.triton
@needs_triton
def test_kernels_compile_for_cards(tmp_path: Path) -> None:
    """To machine code, which needs no card: the interpreter takes much that the compiler refuses."""
    out = run(str(HERE / "compiled_kernels.py"), folder=tmp_path, interpret=False)
    assert out.split() == ["28"]


@pytest.mark.triton
@needs_triton
def test_a_cpu_runs_without_triton(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from serve.engine.config import EngineSettings\n"
        "from serve.engine.loading import make_engine\n"
        "from serve.engine.model import T5Model\n"
        "from tests.engine.gpu.random_weights import random_checkpoint\n"
        "from serve.runtimes import torch_runtime\n"
        "from tests.engine.gpu.shapes import TINY\n"
        "cpu = torch.device('cpu')\n"
        "model = T5Model(random_checkpoint(TINY, device=cpu, dtype=torch.float32), device=cpu, dtype=torch.float32)\n"
        "make_engine(model, EngineSettings())\n"
        "print([name for name in sys.modules if name.startswith('serve.engine.gpu.') and 'kernel' in name])\n"
    )
    assert run("-c", code, folder=tmp_path, interpret=False).strip() == "[]"


@pytest.mark.gpu
@needs_triton
@needs_card
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [*CASES, "card_cases"])
def test_on_a_card(name: str, tmp_path: Path) -> None:
    run_cases(name, tmp_path, interpret=False)
