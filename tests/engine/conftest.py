"""One tiny model for the tests that only need some T5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve.engine.loading import load_model
from serve.engine.model import T5Model
from tests.engine.checkpoints import make_t5_checkpoint


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5_checkpoint(tmp_path_factory.mktemp("small_t5"), "t5_v1_1")


@pytest.fixture(scope="session")
def model(small_folder: Path) -> T5Model:
    return load_model(small_folder, device=torch.device("cpu"), dtype=torch.float32, vocab_limit=380)
