"""One tiny model for the tests that only need some T5."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from serve.engine.loading import load_model
from serve.engine.model import T5Model
from serve.engine.native.library import Level, level, limited
from tests.engine.checkpoints import make_t5_checkpoint


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5_checkpoint(tmp_path_factory.mktemp("small_t5"), "t5_v1_1")


@pytest.fixture(params=sorted({Level.NONE, level()}), ids=lambda some: some.name)
def kernels(request: pytest.FixtureRequest) -> Iterator[Level]:
    """Our own kernels, as far as this processor has them, and torch alone."""
    with limited(request.param):
        yield request.param


@pytest.fixture
def model(small_folder: Path, kernels: Level) -> T5Model:
    return _small_model(small_folder, kernels)


@cache
def _small_model(folder: Path, kernels: Level) -> T5Model:
    """Loaded once for each level, which the caller has set."""
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32, vocab_limit=380)
    assert (model.native_decoder is None) is (kernels is Level.NONE)
    return model
