"""One real server for all tests of this folder that only ask it questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.process import ServerProcess, make_checkpoint


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("server") / "toy-t5")


@pytest.fixture(scope="session")
def server(checkpoint_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(
        "--model", str(checkpoint_folder), "--max-output-tokens", "64", "--max-body-mib", "1"
    ) as process:
        yield process
