"""One server of each kind for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.causal_checkpoints import make_causal_checkpoint
from tests.fuzz.servers import serving
from tests.server.process import ServerProcess, make_checkpoint
from tests.service.toy_tokenizers import byte_level_spec


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = make_checkpoint(tmp_path_factory.mktemp("fuzz") / "toy-t5")
    with serving(folder, tmp_path_factory.mktemp("exemplars")) as server:
        yield server


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = make_causal_checkpoint(tmp_path_factory.mktemp("fuzz") / "toy-llama", eos=261)
    (folder / "tokenizer.json").write_text(byte_level_spec(), encoding="utf-8")
    with serving(folder, tmp_path_factory.mktemp("exemplars")) as server:
        yield server
