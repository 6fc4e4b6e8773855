"""Real servers for all tests of this folder that only ask them questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.process import ServerProcess, make_checkpoint
from tests.server.protocol_cases import MAX_INPUT_TOKENS, MAX_OUTPUT_TOKENS, SETS


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("server") / "toy-t5")


@pytest.fixture(scope="session")
def server(checkpoint_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(
        "--model", str(checkpoint_folder), "--max-output-tokens", "64", "--max-body-mib", "1"
    ) as process:
        yield process


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The bundled demo, which really answers, in float32."""
    folder = tmp_path_factory.mktemp("exemplars")
    for name, exemplars in SETS.items():
        (folder / f"{name}.json").write_text(json.dumps(exemplars), encoding="utf-8")
    with ServerProcess(
        *("--dtype", "float32", "--max-input-tokens", str(MAX_INPUT_TOKENS), "--max-body-mib", "1"),
        *("--max-output-tokens", str(MAX_OUTPUT_TOKENS), "--default-max-tokens", str(MAX_OUTPUT_TOKENS)),
        *("--served-model-name", "flan", "--served-model-name", "other-name", "--exemplars", str(folder)),
    ) as process:
        yield process
